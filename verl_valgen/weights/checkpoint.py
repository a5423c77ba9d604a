"""How transformers would save a model: under which names, tied weights once, and converted into which tensors.

transformers 5 holds the experts of a layer in one tensor and has other names than checkpoints for some; its own
conversion takes that back, a group of tensors at a time. transformers 4 renames those of some models with images. This
module does not know where tensors come from; nothing in it is collective.
"""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

IS_TRANSFORMERS_4 = importlib.util.find_spec("transformers.conversion_mapping") is None


class Checkpoint:
    """Takes a model's tensors one by one and gives those of its checkpoint.

    Args:
        model: A transformers model without adapters, which may be on the meta device; what is tied is one parameter.

    Raises:
        Exception: transformers cannot take one of its conversions back.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.left_out = _tied_to_others(model) | set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        """Names that have no place: of tied weights all but one."""
        names = [name for name in model.state_dict() if name not in self.left_out]
        self.group_of = {} if IS_TRANSFORMERS_4 else _groups(model, names)
        self.sizes: dict[str, int] = defaultdict(int)
        for group in self.group_of.values():
            self.sizes[group] += 1
        self.pending: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.new_names = _new_names(model, [name for name in names if name not in self.group_of])

    def convert(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yields what of the checkpoint one tensor of the model completes.

        Args:
            name: The model's. One that it does not have passes as it is.
            tensor: Whole; it may be overwritten once the result is exhausted. Where several make one, those that come
                before the last are copied.

        Yields:
            Names that the checkpoint has, and tensors, which may be parts of the one that came.
        """
        if name in self.left_out:
            return
        if name not in self.group_of:
            yield self.new_names.get(name, name), tensor
            return
        group = self.group_of[name]
        others = self.pending.pop(group, {})
        if len({*others, name}) < self.sizes[group]:
            self.pending[group] = {**others, name: tensor.clone()}
            return
        from transformers.core_model_loading import revert_weight_conversion

        made = revert_weight_conversion(self.model, {**others, name: tensor})
        del others, tensor
        while made:  # what has been taken is let go of
            first = next(iter(made))
            yield first, made.pop(first)

    def require_all(self) -> None:
        """Raises RuntimeError where a part of what makes tensors of the checkpoint has not come."""
        for group, others in self.pending.items():
            first = next(iter(others))
            raise RuntimeError(f"{first} came without the {self.sizes[group] - len(others)} others that belong to it")


def _tied_to_others(model: nn.Module) -> set[str]:
    """The names that `save_pretrained` drops: of those of one parameter the ones that a class lists as tied."""
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of[id(parameter)].append(name)
    patterns = [
        f"{prefix}.{key}".lstrip(".")
        for prefix, module in model.named_modules()
        for attribute in ("_tied_weights_keys", "_dynamic_tied_weights_keys")
        for key in getattr(module, attribute, None) or ()
    ]
    dropped: set[str] = set()
    for names in names_of.values():
        listed = [name for name in sorted(names) if any(re.search(pattern, name) for pattern in patterns)]
        others = [name for name in names if name not in listed]
        kept = others[0] if others else listed[-1]
        dropped.update(name for name in names if name != kept)
    return dropped


def _groups(model: Any, names: list[str]) -> dict[str, str]:
    """Maps the names of those tensors that transformers 5 converts to what stands for all that go in together."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
    converters = [one.reverse_transform() for one in transforms[::-1] if hasattr(one, "operations")]
    found = {name: rename_source_key(name, [], converters) for name in names}
    return {name: group for name, (group, pattern) in found.items() if pattern is not None}


def _new_names(model: Any, names: list[str]) -> dict[str, str]:
    """Maps names of tensors that are not converted to those that they have in a checkpoint."""
    if IS_TRANSFORMERS_4:
        return {name: _renamed_by_class(model, name) for name in names}
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {name: torch.empty(0, device="meta") for name in names}
    name_of = {id(tensor): name for name, tensor in tensors.items()}
    return {name_of[id(tensor)]: renamed for renamed, tensor in revert_weight_conversion(model, tensors).items()}


def _renamed_by_class(model: Any, name: str) -> str:
    """As transformers 4 saves models with images: by the first of the class's patterns, turned around, that matches."""
    from transformers.modeling_utils import VLMS

    if any(vlm in cls.__name__.lower() for cls in type(model).__mro__[:-1] for vlm in VLMS):
        for original, replaced in (getattr(model, "_checkpoint_conversion_mapping", None) or {}).items():
            renamed, num_found = re.subn(replaced, re.sub(r"\(.*\)", "", original.lstrip("^")), name)
            if num_found:
                name = renamed
                break
    saved_name: str = model._fix_state_dict_key_on_save(name)[0]
    return saved_name
