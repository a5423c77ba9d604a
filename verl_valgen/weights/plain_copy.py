"""A plain Hugging Face model, filled by tensors that come one by one under their names.

This module knows which tensors a model has, and what has come. It does not know how a parameter is gathered, and
nothing in it is collective.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from verl_valgen.weights.adapters import merge, outermost_layers, without_adapters
from verl_valgen.weights.other_tensors import copy_other_tensors
from verl_valgen.weights.slots import (
    Weight,
    assign,
    cast,
    parameter_weights,
    persistent_buffers,
    say_what_is_tied,
    tie_again,
)
from verl_valgen.weights.structure import named_modules, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PlainCopy:
    """A model that begins empty and is filled one whole parameter at a time.

    Args:
        model: The result of `empty_like` or `empty_from_config`; becomes the copy. Its tensors' dtypes are the copy's.
        device: Where the copy lies.
        source: The model that was given to `empty_like`, in FSDP1's wrapper if it has one. From it tensors that are not
            parameters are copied, and it says what is tied. With None both are as the model was built.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, source: nn.Module | None = None) -> None:
        self.model, self.device, self.has_source = model.eval(), device, source is not None
        self.weights = parameter_weights(model, tied_names(model if source is None else source))
        self.distinct_weights = list(dict.fromkeys(self.weights.values()))
        self.buffers = persistent_buffers(model)
        weight_of: dict[int, Weight] = {}
        for weight in self.distinct_weights:  # tied as the source is, whatever the configuration says
            assign(weight.slots, weight.slots[0].parameter.detach().to("meta"))
            weight_of[id(weight.slots[0].parameter)] = weight
        # PEFT's layers, with the weights in each; the layers that wait for a weight; the modules in all of them.
        self.layers = {layer: {weight_of[id(p)] for p in layer.parameters()} for layer in outermost_layers(model)}
        self.waiting: dict[Weight, list[Any]] = defaultdict(list)
        for layer, weights in self.layers.items():
            for weight in weights:
                self.waiting[weight].append(layer)
        self.in_layers = {module for layer in self.layers for module in layer.modules()}
        # At once: what PEFT merges may depend on buffers.
        copy_other_tensors(model, named_modules(model if source is None else source), device)

    @property
    def num_bytes(self) -> int:
        """The size of the parameters once all have been received."""
        slots = [weight.slots[0] for weight in self.distinct_weights]
        return sum(slot.parameter.numel() * slot.dtype.itemsize for slot in slots)

    def names_not_in(self, dtype: torch.dtype) -> list[str]:
        """The names of the floating-point parameters that this model has in another dtype, those that merge aside."""
        return [
            name
            for name, weight in self.weights.items()
            if weight not in self.waiting
            and any(slot.dtype.is_floating_point and slot.dtype is not dtype for slot in weight.slots)
        ]

    def receive(self, name: str, parameter: Tensor) -> None:
        """Copies in one whole parameter or buffer, and merges a PEFT layer as soon as all of its parameters are there.

        Args:
            name: Without the wrappers' parts; any of its names where a parameter is tied.
            parameter: Of any dtype, on any device.

        Raises:
            KeyError: The model has no parameter or buffer of this name.
            NotImplementedError: An adapter cannot be merged.
        """
        if name not in self.weights:  # a state dict holds buffers too
            slot = self.buffers[name]
            slot.module._buffers[slot.attribute] = self._converted(parameter, slot.dtype)
            return
        weight = self.weights[name]
        if weight.is_received:
            self._untie_if_another(name, parameter)
            return
        weight.is_received = True
        # What a PEFT layer will merge stays in float32 until then, apart from what is tied to it and must not change.
        merging = [slot for slot in weight.slots if slot.module in self.in_layers]
        if merging:
            assign(merging, self._converted(parameter, torch.float32))
        others = [slot for slot in weight.slots if slot not in merging]
        for dtype in {slot.dtype for slot in others}:
            assign([slot for slot in others if slot.dtype is dtype], self._converted(parameter, dtype))
        for layer in self.waiting[weight]:
            if all(other.is_received for other in self.layers[layer]):
                self._merge(layer)

    def _converted(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy on the device; what is no floating-point number keeps its dtype."""
        dtype = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(device=self.device, dtype=dtype, copy=True)

    def _untie_if_another(self, name: str, parameter: Tensor) -> None:
        """A stream may have a tied parameter twice, or two where the configuration ties and the checkpoint did not."""
        if self.has_source:
            return
        weight, (prefix, _, attribute) = self.weights[name], name.rpartition(".")
        module = self.model.get_submodule(prefix)
        slot = next(slot for slot in weight.slots if slot.module is module and slot.attribute == attribute)
        value = self._converted(parameter, slot.dtype)
        if not torch.equal(value, slot.parameter):
            weight.slots.remove(slot)
            self.weights[name] = Weight([slot], is_received=True)
            assign([slot], value)

    def _merge(self, layer: Any) -> None:
        inside = set(layer.modules())
        slots = {weight: [slot for slot in weight.slots if slot.module in inside] for weight in self.layers[layer]}
        for weight, own in slots.items():
            if any(slot.module in self.in_layers and slot.module not in inside for slot in weight.slots):
                # Another layer merges something else into it.
                assign(own, own[0].parameter.detach().clone())
        with_new_bias = merge(layer)
        for own in slots.values():
            cast(own)
        for module in with_new_bias:
            module.bias.data = module.bias.data.to(module.weight.dtype)

    def require_all(self) -> None:
        """Raises RuntimeError where a parameter was never received; the message names it."""
        missing = sorted(name for name, weight in self.weights.items() if not weight.is_received)
        if missing:
            raise RuntimeError(f"{len(missing)} parameters were not gathered, {missing[0]} first")

    def finish(self) -> PreTrainedModel:
        """Returns the filled model, without PEFT's layers, in eval mode.

        Raises:
            RuntimeError: A parameter was never received; the message names it.
        """
        self.require_all()
        model: Any = without_adapters(self.model)
        for weight in self.distinct_weights:
            cast(weight.slots)
            tie_again(weight.slots)
        say_what_is_tied(model)
        return model.requires_grad_(False).eval()
