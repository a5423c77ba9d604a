"""Where a tensor belongs that comes under a checkpoint's name, by transformers' own conversions.

transformers 5 holds the experts of a layer in one tensor, checkpoints and engines hold one tensor an expert, and what
makes the one of the other is known to transformers alone: it renames and converts as `from_pretrained` does. With
transformers 4, which holds experts as checkpoints do, there is nothing to convert. This module moves no values.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verl_valgen.text import describe

logger = logging.getLogger(__name__)


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


class Conversions:
    """The routes into one model.

    Args:
        model: A transformers model; its parameters may be on the meta device.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = model.state_dict()
        self.renamings: list[Any] = []
        self.converters: list[Any] = []
        self.is_transformers_4 = importlib.util.find_spec("transformers.conversion_mapping") is None
        if self.is_transformers_4:
            return
        from transformers.conversion_mapping import get_model_conversion_mapping

        for transform in get_model_conversion_mapping(model):
            (self.converters if hasattr(transform, "operations") else self.renamings).append(transform)

    def route(self, name: str, shape: torch.Size) -> Route | None:
        """Returns where a tensor of this name and shape belongs, None where it belongs nowhere.

        The model's own names come first: an engine may export what transformers holds. Where a route leads to a single
        tensor without a converter, the shapes may differ.
        """
        if name in self.tensors and self.tensors[name].shape == shape:
            return Route((name,))
        routes = (
            self._converted(name, self.converters),
            self._unpacked(name, shape),
            self._row(name, shape),
            self._converted(name, self._of_the_usual_experts),
            Route((name,)) if name in self.tensors else None,
        )
        return next((route for route in routes if route is not None), None)

    def is_ignored(self, name: str) -> bool:
        """Whether transformers loads nothing from a tensor of this name: parts that it leaves out, computed buffers."""
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns) or name in dict(self.model.named_buffers())

    def names(self) -> list[str]:
        """The names that have a place: the model's own, and those of a checkpoint as transformers would save it."""
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.tensors.items()}
        try:
            from transformers.core_model_loading import revert_weight_conversion

            return list(dict.fromkeys([*empty, *revert_weight_conversion(self.model, dict(empty))]))
        except Exception as e:  # transformers 4, or one of its conversions that cannot be reversed
            logger.debug("a checkpoint's names are not known: %s", describe(e))
            return list(empty)

    def _converted(self, name: str, converters: list[Any]) -> Route | None:
        """By renaming, and at most one converter, as `from_pretrained` finds them."""
        if self.is_transformers_4:
            return None
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        renamed, pattern = rename_source_key(name, self.renamings, converters, prefix, self.tensors)
        if pattern is None:
            return Route((renamed,)) if renamed in self.tensors else None
        converter = next(converter for converter in converters if pattern in converter.source_patterns)
        first = converter.target_patterns[0]
        targets = tuple(renamed.replace(first, target) for target in converter.target_patterns)
        if not all(target in self.tensors for target in targets):
            return None
        before, _ = rename_source_key(name, self.renamings, [])
        return Route(targets, converter, renamed, pattern, _expert(before, pattern) if _is_by_rows(converter) else None)

    def _unpacked(self, name: str, shape: torch.Size) -> Route | None:
        """By a converter the other way round: the engine holds packed what this model holds in modules."""
        if not self._reversed:
            return None
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(name, [], self._reversed)
        if pattern is None:
            return None
        converter = next(converter for converter in self._reversed if pattern in converter.source_patterns)
        route = Route((), converter, renamed, pattern)
        targets = tuple(convert(route, {name: (pattern, torch.empty(shape, device="meta"))}, self.model))
        return route._replace(targets=targets) if all(target in self.tensors for target in targets) else None

    def _row(self, name: str, shape: torch.Size) -> Route | None:
        """A row of a tensor that transformers packs in checkpoints too, with its number somewhere in the name."""
        for shorter, row in _without_a_number(name):
            renamed = self._converted(shorter, [])
            for target in (shorter, *(renamed.targets if renamed is not None else ())):
                if target in self.tensors and self.tensors[target].shape[1:] == shape:
                    return Route((target,), row=row)
        return None

    @cached_property
    def _reversed(self) -> list[Any]:
        if self.is_transformers_4:
            return []
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        # A model of the hub's own code may have the type of one of transformers', which newer ones no longer look at.
        transforms = self.converters or get_checkpoint_conversion_mapping(self.model.config.model_type) or []
        converters = []
        for transform in transforms:
            try:
                if hasattr(transform, "operations"):
                    converters.append(transform.reverse_transform())
            except Exception as e:
                logger.debug("transformers cannot reverse %s: %s", transform, describe(e))
        return converters

    @cached_property
    def _of_the_usual_experts(self) -> list[Any]:
        """Converters for experts that checkpoints hold packed, and engines export one by one under the usual names.

        transformers has none for these. Which way round the tensors lie the shapes tell.
        """
        packed = [name for name in self.tensors if name.endswith(".experts.gate_up_proj")]
        if self.is_transformers_4 or not packed:
            return []
        from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

        experts = packed[0].removesuffix(".gate_up_proj")
        if not getattr(self.model.get_submodule(experts), "is_concatenated", True):
            return []  # gate's and up's columns take turns, in a way that no engine exports
        width = self.tensors[packed[0]].shape[2]
        turned = [Transpose(1, 2)] if width == 2 * self.tensors[f"{experts}.down_proj"].shape[1] else []
        gate, up, down = (f".experts.*.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj"))
        return [
            WeightConverter([gate, up], ".experts.gate_up_proj", [MergeModulelist(0), Concatenate(1), *turned]),
            WeightConverter([down], ".experts.down_proj", [MergeModulelist(0), *turned]),
        ]


def convert(route: Route, sources: Mapping[str, tuple[str, Tensor]], model: Any) -> dict[str, Tensor]:
    """Applies a route's converter to all of its sources, or to those of one row.

    Args:
        sources: By the names that they came under, the pattern that the route of each has, and the tensor.

    Returns:
        The tensors by the model's names; of one row, with a first dimension of size 1.
    """
    from transformers.core_model_loading import dot_natural_key

    converter = deepcopy(route.converter)
    for name in sorted(sources, key=dot_natural_key):  # expert 10 after expert 9
        pattern, tensor = sources[name]
        converter.add_tensor(route.layer_name, name, pattern, tensor)
    made = converter.convert(route.layer_name, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _is_by_rows(converter: Any) -> bool:
    """Whether every row of the target is made of one expert's tensors alone."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    first, *others = converter.operations
    return (
        len(converter.target_patterns) == 1
        and type(first) is MergeModulelist
        and first.dim == 0
        and all(
            (type(other) is Concatenate and other.dim > 0)
            or (type(other) is Transpose and {other.dim0, other.dim1} == {1, 2} and not other.check_dims)
            for other in others
        )
    )


def _expert(name: str, pattern: str) -> int | None:
    """The number that stands where a pattern has its star."""
    found = re.search(pattern.replace(".*.", r"\.(?P<expert>\d+)\."), name) if pattern.count(".*.") == 1 else None
    return None if found is None else int(found["expert"])


def _without_a_number(name: str) -> Iterator[tuple[str, int]]:
    """The name without one of its numbers, and the number, each time also without a module's `.weight`."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            shorter = ".".join(parts[:i] + parts[i + 1 :])
            yield shorter, int(part)
            yield shorter.removesuffix(".weight"), int(part)
