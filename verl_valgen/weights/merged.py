"""The weights of a plain model out of those of one with adapters, as they come, a layer at a time.

What has no adapters passes; a layer that has some is held until all of it is there, merged as `PlainCopy` merges, and
dropped. Nothing here is collective.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from verl_valgen.weights.adapters import outermost_layers, without_adapters
from verl_valgen.weights.checkpoint import Checkpoint
from verl_valgen.weights.slots import Slot, assign, persistent_buffers
from verl_valgen.weights.structure import base_model

if TYPE_CHECKING:
    from verl_valgen.weights.plain_copy import PlainCopy


class MergedWeights:
    """Hands on what a plain copy is filled with.

    Args:
        copy: One that nothing has been received in, made like the source; it never has more than a layer. Its tensors'
            dtypes, and its device, are those of what is handed on.
        source: The model that it is made like, without FSDP1's wrapper.
    """

    def __init__(self, copy: PlainCopy, source: nn.Module) -> None:
        self.copy = copy
        plain, self.prefixes = _plain_model(copy.model)
        conversions = getattr(base_model(source), "_weight_conversions", None)
        if conversions is not None:  # with what was found in the files that the source came from
            plain._weight_conversions = conversions
        self.checkpoint = Checkpoint(plain)

    def as_checkpoint(self, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors of the checkpoint that `save_pretrained` would write of a plain copy.

        Args:
            parameters: All of the source's, by names without the wrappers' parts; as `full_parameters.Parameters`.

        Yields:
            Names of the checkpoint, and tensors that are valid until the next one is asked for.

        Raises:
            NotImplementedError: An adapter cannot be merged.
            RuntimeError: A parameter never came; the message names it.
        """
        for name, parameter in parameters:
            yield from self._taken(name, parameter)
            del parameter  # perhaps the memory in which the next ones come
        self.copy.require_all()
        for slot in persistent_buffers(self.copy.model).values():
            yield from self._handed_on([slot], slot.module._buffers[slot.attribute])
        self.checkpoint.require_all()

    def _taken(self, name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        weight = self.copy.weights[name]
        if weight.is_received:
            return
        inside = [slot for slot in weight.slots if slot.module in self.copy.in_layers]
        yield from self._handed_on([slot for slot in weight.slots if slot not in inside], parameter)
        if not inside:
            weight.is_received = True
            return
        weight.slots = inside  # what it is tied to in a layer without adapters is not to be held
        self.copy.receive(name, parameter)
        for layer in self.copy.waiting[weight]:
            if all(other.is_received for other in self.copy.layers[layer]):  # and so merged
                for module in layer.modules():
                    for attribute, value in module._parameters.items():
                        if value is not None:
                            yield from self._handed_on([Slot(module, attribute, value.dtype)], value)
                _drop(layer)

    def _handed_on(self, slots: list[Slot], value: Any) -> Iterator[tuple[str, Tensor]]:
        """Under the one of its names that a checkpoint has, in the dtype of its place; adapters have no name."""
        for module, attribute, dtype in slots:
            for prefix in self.prefixes.get(module, ()):
                name = f"{prefix}.{attribute}".lstrip(".")
                if name not in self.checkpoint.left_out:
                    to_dtype = dtype if value.is_floating_point() else value.dtype
                    yield from self.checkpoint.convert(name, value.detach().to(self.copy.device, to_dtype))


def _drop(layer: nn.Module) -> None:
    for module in layer.modules():
        for attribute, value in module._parameters.items():
            if value is not None:
                module._parameters[attribute] = nn.Parameter(value.detach().to("meta"), requires_grad=False)


def _plain_model(model: nn.Module) -> tuple[Any, dict[nn.Module, list[str]]]:
    """A model without parameters' values as it is once adapters are merged and taken off; and by the modules of the one
    that has them their names in it, of which a module that is in several places has several."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    plain = deepcopy(model, memo)  # meta tensors, but for the buffers, which stay those that they are
    for layer in outermost_layers(plain):
        _untie(layer)
    originals = {memo[id(module)]: module for module in model.modules()}
    plain = without_adapters(plain)
    prefixes: dict[nn.Module, list[str]] = {}
    for prefix, module in plain.named_modules(remove_duplicate=False):
        if module in originals:
            prefixes.setdefault(originals[module], []).append(prefix)
    return plain, prefixes


def _untie(layer: nn.Module) -> None:
    """Merged, a layer's weights are no longer those that they were tied to."""
    for module in layer.modules():
        for attribute, value in module._parameters.items():
            if value is not None:
                assign([Slot(module, attribute, value.dtype)], value.detach().clone())
