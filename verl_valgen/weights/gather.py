"""Gathers the trainer's model, however it is sharded, into a plain Hugging Face model on the ranks that generate.

`generate` on the wrapped model either fails (inside `summon_full_params` the mixed precision dtypes clash) or gathers
every layer for every token. So the parameters are gathered once, unit by unit, into a model of the original class that
knows nothing of FSDP or PEFT. The trainer's model is only read. This module knows nothing of verl.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from verl_valgen.collectives import gather_values, world_size
from verl_valgen.weights.adapters import outermost_layers
from verl_valgen.weights.dtensors import Wanted, whole_tensors
from verl_valgen.weights.empty import empty_like
from verl_valgen.weights.plain_copy import PlainCopy
from verl_valgen.weights.streams import Parameters, pull, together
from verl_valgen.weights.structure import clean_name, tensor_attributes, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def gather(
    wrapped: nn.Module,
    *,
    dtype: torch.dtype,
    device: torch.device,
    keep: bool,
) -> PreTrainedModel | None:
    """Makes a plain copy of a sharded model. Collective: all ranks must call.

    LoRA and other PEFT adapters are folded in with PEFT's own `merge`, in float32, before the cast.

    Args:
        wrapped: A model under FSDP1, FSDP2 or neither, with or without PEFT.
        dtype: The dtype of the copy, as `from_pretrained(dtype=...)` understands it: what transformers keeps in
            float32 stays there.
        device: Where the copy lies. With NCCL it must be the rank's own device.
        keep: Whether this rank wants the copy. The others take part and keep nothing.

    Returns:
        The copy in eval mode, None where `keep` is false or where another rank could not prepare for it. Peak memory
        above the level before: the copy plus one FSDP unit (twice one parameter under FSDP2) where `keep` is true, the
        unit elsewhere.

    Raises:
        Exception: Whatever prevented the copy, on the rank concerned and only after the last collective. (What fails
            inside a collective is raised at once: there the ranks are lost to each other anyway.)
    """
    source = unwrap(wrapped)
    return collect(
        lambda uncast: full_parameters(wrapped, dtype=dtype, device=device, uncast=uncast | merging_names(source)),
        lambda: PlainCopy(empty_like(source, dtype), device, source=wrapped),
        dtype=dtype,
        device=device,
        keep=keep,
    )


@torch.no_grad()
def collect(
    parameters: Callable[[set[str]], Parameters],
    new_copy: Callable[[], PlainCopy],
    *,
    dtype: torch.dtype,
    device: torch.device,
    keep: bool,
) -> PreTrainedModel | None:
    """Fills a plain copy from a stream of parameters, wherever they come from. Collective: all ranks must call.

    Args:
        parameters: Called on all ranks once all have prepared, with the names of parameters that a copy has in another
            dtype than `dtype`. Every rank exhausts the generator that it returns, or, where another rank got none,
            closes it: what an exporter has changed in the trainer is then as it was.
        new_copy: Called where `keep` is true.

    The other arguments, the result and the exceptions are those of `gather`.
    """
    start = time.perf_counter()
    copy, are_ready = together(lambda: new_copy() if keep else None, device)
    if not are_ready:
        return None
    uncast = gather_values([] if copy is None else copy.names_not_in(dtype), device)
    stream, are_ready = together(lambda: parameters(set().union(*uncast)), device)
    if stream is None or not are_ready:
        return None

    def fill(pairs: Iterator[tuple[str, Tensor]]) -> PreTrainedModel:
        nonlocal copy
        filling, copy = copy, None  # alone in this frame, which an error lets go of
        assert filling is not None
        num_bytes = 0
        for name, parameter in pairs:
            num_bytes += parameter.numel() * parameter.element_size()
            filling.receive(name, parameter)
            del parameter
        model = filling.finish()
        logger.debug(
            "gathered %.1f MB on %d rank(s) into a %s copy of %s on %s in %.3f s",
            num_bytes / 1e6, world_size(), dtype, type(model).__name__, device, time.perf_counter() - start,
        )  # fmt: skip
        return model

    return pull(stream, fill if keep else None)


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
