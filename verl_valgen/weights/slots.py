"""Where the parameters of a model stand, and what is tied: the same parameter in several places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Slot(NamedTuple):
    """A module, the name of one of its parameters or buffers, and the dtype that it is to have."""

    module: nn.Module
    attribute: str
    dtype: torch.dtype

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter


@dataclass(eq=False)
class Weight:
    """A parameter. Tied, it has several slots, and may come under any of several names."""

    slots: list[Slot] = field(default_factory=list)
    is_received: bool = False


def parameter_weights(model: nn.Module, ties: dict[str, str]) -> dict[str, Weight]:
    """Maps the name of every parameter, tied ones included, to its weight.

    Args:
        ties: See `structure.tied_names`; a name that is not in it stands for itself.
    """
    weights: dict[str, Weight] = {}
    named: dict[str, Weight] = {}
    for name, module, attribute in _names(model):
        if (parameter := module._parameters.get(attribute)) is not None:
            named[name] = weight = weights.setdefault(ties.get(name, name), Weight())
            slot = Slot(module, attribute, parameter.dtype)
            if slot not in weight.slots:  # a module may have several names itself
                weight.slots.append(slot)
    return named


def persistent_buffers(model: nn.Module) -> dict[str, Slot]:
    """Maps the names of the buffers that a state dict holds to where they stand."""
    return {
        name: Slot(module, attribute, buffer.dtype)
        for name, module, attribute in _names(model)
        if attribute not in module._non_persistent_buffers_set
        and (buffer := module._buffers.get(attribute)) is not None
    }


def _names(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute in (*module._parameters, *module._buffers):
            yield f"{prefix}.{attribute}".lstrip("."), module, attribute


def assign(slots: Iterable[Slot], value: Tensor) -> None:
    """Puts one parameter, which shares the value's memory, into all slots."""
    parameter = nn.Parameter(value, requires_grad=False)
    for module, attribute, _ in slots:
        module._parameters[attribute] = parameter


def cast(slots: Iterable[Slot]) -> None:
    """Brings what stands in slots to their dtypes; the same dtype in all slots of a parameter."""
    for module, attribute, dtype in slots:
        parameter = module._parameters.get(attribute)
        if parameter is not None and parameter.is_floating_point() and parameter.dtype is not dtype:
            parameter.data = parameter.data.to(dtype)


def tie_again(slots: list[Slot]) -> None:
    """Makes one parameter of those in these slots again where they have the same values."""
    present = [slot for slot in slots if slot.module._parameters.get(slot.attribute) is not None]
    for slot in present[1:]:
        first, other = present[0].parameter, slot.parameter
        if first is not other and first.dtype is other.dtype and torch.equal(first, other):
            slot.module._parameters[slot.attribute] = first


def say_what_is_tied(model: Any) -> None:
    """Has the configuration say so where the output layer is no longer the embedding, lest they be tied again."""
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # classes that do not tell
        return
    if embedding is None or head is None or getattr(embedding, "weight", None) is getattr(head, "weight", None):
        return
    parts = [model.config, *(getattr(model.config, name, None) for name in getattr(model.config, "sub_configs", {}))]
    for part in parts:
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
