"""Every parameter of a sharded model, whole, one after the other, on all ranks. The model is only read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from verl_valgen.weights.adapters import outermost_layers
from verl_valgen.weights.dtensors import Wanted, whole_tensors
from verl_valgen.weights.structure import clean_name, tensor_attributes

_T = TypeVar("_T")

Parameters = Generator[tuple[str, Tensor], None, None]
"""Pairs of a parameter's name and the whole tensor, one after the other. The tensor may be the trainer's own memory and
is valid until the next one is asked for: copy it, do not write to it. Let go of it then: its memory may be needed."""

Consumer = Callable[[Iterator[tuple[str, Tensor]]], _T]
"""Pulls pairs as `Parameters` describes them, as many as it likes."""


def merging_names(source: nn.Module) -> set[str]:
    """The names of parameters that take part in a merge of adapters, those tied to them included. Under FSDP1, which
    yields parameters in their own dtype in any case, there are none."""
    merging = {id(parameter) for layer in outermost_layers(source) for parameter in layer.parameters()}
    named = source.named_parameters(remove_duplicate=False)
    return {clean_name(name) for name, parameter in named if id(parameter) in merging}


def full_parameters(wrapped: nn.Module, *, dtype: torch.dtype, device: torch.device, uncast: set[str]) -> Parameters:
    """Yields every parameter of a sharded model, whole, one after the other. Collective: all ranks must exhaust it.

    Args:
        dtype: What the receiver will cast to. Under FSDP2 that is done before the all-gather, for less traffic.
        device: The rank's own device; FSDP2's shards are brought there first.
        uncast: Names, without the wrappers' parts, of parameters that must come in their own dtype.

    Yields:
        Names without the wrappers' parts, and tensors, as `Parameters` describes them.
    """
    if isinstance(wrapped, FSDP):
        yield from _full_parameters_fsdp1(wrapped)
        return
    # After a forward pass the root stays unsharded, with parameters in the compute dtype; its sharded ones are the
    # originals. The next forward unshards it again.
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    named = [(clean_name(name), parameter) for name, parameter in wrapped.named_parameters()]
    yield from whole_tensors(
        [
            Wanted(name, value, dtype if value.is_floating_point() and name not in uncast else value.dtype)
            for name, value in named
        ],
        device,
    )


def _full_parameters_fsdp1(root: FSDP) -> Parameters:
    # `named_modules` is in pre-order, and the order matters: summoned before the root's first forward, a child would
    # be initialised as a root and break training ("Non-root FSDP instance's `_is_root` should not have been set yet").
    units = [(name, module) for name, module in root.named_modules() if isinstance(module, FSDP)]
    all_units: set[nn.Module] = {unit for _, unit in units}
    for unit_name, unit in units:
        modules = list(unit.named_modules(memo=all_units - {unit}, prefix=unit_name))
        # Between forward passes the modules hold views left over from the last one. They are not to be computed with,
        # but PEFT's DoRA takes a dtype from one, and summoning would leave others behind.
        views = [(module, tensor_attributes(module)) for _, module in modules]
        try:
            with FSDP.summon_full_params(unit, recurse=False, writeback=False):
                for module_name, module in modules:
                    for name, parameter in module._parameters.items():
                        if parameter is not None and name != "_flat_param":
                            yield clean_name(f"{module_name}.{name}".removeprefix(".")), parameter
        finally:
            for module, attributes in views:
                vars(module).update(attributes)
