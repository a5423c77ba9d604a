"""Where a tensor belongs that comes under a checkpoint's name, by transformers' own conversions.

transformers 5 holds the experts of a layer in one tensor, checkpoints and engines hold one tensor an expert, and what
makes the one of the other is known to transformers alone: it renames and converts as `from_pretrained` does.
transformers 4, which holds experts as checkpoints do, converts nothing, and a few of its classes rename. This module
moves no values.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from verl_valgen.text import describe
from verl_valgen.weights.routes import Route, convert, expert_in, is_by_rows, without_a_number

logger = logging.getLogger(__name__)


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
        found = self._converted(name, self.converters) or self._unpacked(name, shape)
        if found is None and not self.fits_both_ways(name, shape):
            found = self._row(name, shape) or self._converted(name, self._of_the_usual_experts)
            found = found or (Route((name,)) if name in self.tensors else None)
        return found

    def fits_both_ways(self, name: str, shape: torch.Size) -> bool:
        """Whether it cannot be told how an expert's matrix lies: the model has it turned, and it is square."""
        is_square = len(shape) == 2 and shape[0] == shape[1]
        return is_square and self._has_turned_experts and self._converted(name, self._of_the_usual_experts) is not None

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
            renamed = self._renamed_by_class(name)
            return Route((renamed,)) if renamed in self.tensors else None
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
        return Route(
            targets, converter, renamed, pattern, expert_in(before, pattern) if is_by_rows(converter) else None
        )

    def _renamed_by_class(self, name: str) -> str:
        """As transformers 4 does for models with images: by the first of the class's patterns that is in the name."""
        for pattern, replacement in (getattr(self.model, "_checkpoint_conversion_mapping", None) or {}).items():
            renamed, num_found = re.subn(pattern, replacement, name)
            if num_found:
                return renamed
        return name

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
        try:
            targets = tuple(convert(route, {name: (pattern, torch.empty(shape, device="meta"))}, self.model))
        except Exception as e:  # of another shape than what it is taken for
            logger.debug("%s cannot be unpacked: %s", name, describe(e))
            return None
        return route._replace(targets=targets) if all(target in self.tensors for target in targets) else None

    def _row(self, name: str, shape: torch.Size) -> Route | None:
        """A row of a tensor that transformers packs in checkpoints too, with its number somewhere in the name."""
        for shorter, row in without_a_number(name):
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
    def _has_turned_experts(self) -> bool:
        """Whether packed experts lie as (experts, in, out), where a linear layer has (out, in)."""
        for name, tensor in self.tensors.items():
            down = self.tensors.get(f"{name.removesuffix('gate_up_proj')}down_proj")
            if name.endswith(".experts.gate_up_proj") and down is not None:
                return tensor.shape[2] == 2 * down.shape[1]
        return False

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
        turned = [Transpose(1, 2)] if self._has_turned_experts else []
        gate, up, down = (f".experts.*.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj"))
        return [
            WeightConverter([gate, up], ".experts.gate_up_proj", [MergeModulelist(0), Concatenate(1), *turned]),
            WeightConverter([down], ".experts.down_proj", [MergeModulelist(0), *turned]),
        ]
