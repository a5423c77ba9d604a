"""One exported tensor's way into a model, and transformers' converter applied along it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any, NamedTuple

from torch import Tensor


class Route(NamedTuple):
    """Where one exported tensor belongs."""

    targets: tuple[str, ...]
    """The model's names of all that its conversion makes."""
    converter: Any = None
    """transformers' `WeightConverter`, None where the tensor is the target, or a row of it, as it is."""
    layer_name: str = ""
    """What the converter knows the targets by."""
    source_pattern: str = ""
    """Which of the converter's sources the tensor is."""
    row: int | None = None
    """The target's row (an expert) that is made by itself, None where the target is made as a whole."""


def convert(route: Route, sources: Mapping[str, tuple[str, Tensor]], model: Any) -> dict[str, Tensor]:
    """Applies a route's converter to all of its sources, or to those of one row.

    Args:
        sources: By the names that they came under, the pattern that the route of each has, and the tensor.

    Returns:
        The tensors by the model's names; of one row, with a first dimension of size 1.
    """
    from transformers.core_model_loading import dot_natural_key

    converter = copy(route.converter)  # not deeply: there are thousands of experts
    converter.collected_tensors, converter.layer_targets = defaultdict(list), defaultdict(set)
    for name in sorted(sources, key=dot_natural_key):  # expert 10 after expert 9
        pattern, tensor = sources[name]
        converter.add_tensor(route.layer_name, name, pattern, tensor)
    made = converter.convert(route.layer_name, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def is_by_rows(converter: Any) -> bool:
    """Whether every row of the target is made of one expert's tensors alone."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    first, *others = converter.operations
    return (
        len(converter.target_patterns) == 1
        and type(first) is MergeModulelist
        and first.dim == 0
        and all(
            (type(other) is Concatenate and other.dim > 0)
            or (
                type(other) is Transpose
                and {other.dim0, other.dim1} == {1, 2}
                and not getattr(other, "check_dims", False)
            )
            for other in others
        )
    )


def expert_in(name: str, pattern: str) -> int | None:
    """The number that stands where a pattern has its star."""
    found = re.search(pattern.replace(".*.", r"\.(?P<expert>\d+)\."), name) if pattern.count(".*.") == 1 else None
    return None if found is None else int(found["expert"])


def without_a_number(name: str) -> Iterator[tuple[str, int]]:
    """The name without one of its numbers, and the number, each time also without a module's `.weight`."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            shorter = ".".join(parts[:i] + parts[i + 1 :])
            yield shorter, int(part)
            yield shorter.removesuffix(".weight"), int(part)
