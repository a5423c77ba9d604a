"""The weights of the trainer's model as its checkpoint would have them, tensor by tensor, for whom a copy is no use.

This module knows nothing of who takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor, nn

from verl_valgen.collectives import clear_frames, gather_values, pull, together
from verl_valgen.weights.checkpoint import Checkpoint
from verl_valgen.weights.conversions import Conversions
from verl_valgen.weights.empty import empty_like
from verl_valgen.weights.full_parameters import Consumer, Parameters, full_parameters, merging_names
from verl_valgen.weights.merged import MergedWeights
from verl_valgen.weights.plain_copy import PlainCopy
from verl_valgen.weights.structure import unwrap

_T = TypeVar("_T")
_Change = Callable[[Iterable[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]


@torch.no_grad()
def stream(
    wrapped: nn.Module, consume: Consumer[_T], *, dtype: torch.dtype, device: torch.device, keep: bool
) -> _T | None:
    """Has a consumer pull the weights of a sharded model as a checkpoint has them. Collective: all ranks must call.

    They are what `save_pretrained` would write of the copy that `gather` makes: the names and the layout of a
    checkpoint (transformers 5 packs experts, and renames), PEFT's adapters merged in float32, persistent buffers, tied
    weights once. A weight that was tied, and that adapters or PEFT have made another, comes under its own name too.

    Args:
        wrapped: A model under FSDP1, FSDP2 or neither, with or without PEFT.
        consume: Called where `keep` is true, without gradients, with an iterator of names and whole tensors on the
            device, in no particular order. A tensor may be the trainer's own memory, is valid until the next one is
            asked for, and is not to be written to. The consumer may stop early: the rest is gathered and dropped.
            Before collectives of its own it must exhaust the iterator, also where it fails: until then other ranks wait
            for this one in a gather. (What the iterator itself raises, it raises exhausted.)
        dtype: Of floating-point tensors, as `from_pretrained(dtype=...)` understands it: what transformers keeps in
            float32 stays there.
        device: The rank's own device.
        keep: Whether this rank wants the weights. The others take part and keep nothing.

    Returns:
        What the consumer returns; None where `keep` is false or where another rank could not prepare. Peak memory
        beside the consumer's: an FSDP unit (twice one parameter under FSDP2), and where `keep` is true a layer with
        adapters in float32, or what transformers converts together (a layer's experts), as it is and converted.

    Raises:
        Exception: What the consumer raised, or what prevented the stream, on the rank concerned and only after the last
            collective. (What fails inside a collective is raised at once.)
    """
    source = unwrap(wrapped)
    merging, are_ready = together(
        lambda: MergedWeights(PlainCopy(empty_like(source, dtype), device, source=wrapped), source) if keep else None,
        device,
    )
    if not are_ready:
        return None
    uncast = gather_values([] if merging is None else merging.copy.names_not_in(dtype), device)
    names = set().union(*uncast) | merging_names(source)
    parameters = full_parameters(wrapped, dtype=dtype, device=device, uncast=names)
    if merging is None:
        return pull(parameters, None)
    return pull(parameters, _through(merging.as_checkpoint, consume))


@torch.no_grad()
def stream_exported(
    parameters: Callable[[], Parameters],
    new_model: Callable[[], nn.Module],
    consume: Consumer[_T],
    *,
    device: torch.device,
    keep: bool,
) -> _T | None:
    """As `stream`, of what an engine exports. Collective: all ranks must call.

    Persistent buffers are among it where the engine exports them.

    Args:
        parameters: Called on all ranks once all have prepared. Names are a checkpoint's or the model's own. Every rank
            exhausts the generator, or, where another rank got none, closes it.
        new_model: Makes the result of `empty_from_config`; called where `keep` is true. It has the dtypes.
    """
    exported, are_ready = together(lambda: _Exported(new_model(), device) if keep else None, device)
    if not are_ready:
        return None
    source, are_ready = together(parameters, device)
    if source is None or not are_ready:
        return None
    return pull(source, None if exported is None else _through(exported.as_checkpoint, consume))


class _Exported:
    """What an engine exports, in the dtypes of a model that is made by `empty_from_config`."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.conversions = Conversions(model)
        self.checkpoint = Checkpoint(model)

    def as_checkpoint(self, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        own = self.conversions.tensors
        for name, parameter in parameters:
            route = self.conversions.route(name, parameter.shape)
            dtype = parameter.dtype
            if route is not None and parameter.is_floating_point():
                dtype = own[route.targets[0]].dtype
            parameter = parameter.detach().to(self.device, dtype)
            if name in own and own[name].shape == parameter.shape:
                yield from self.checkpoint.convert(name, parameter)
            else:
                yield name, parameter
            del parameter  # perhaps the memory in which the next ones come
        self.checkpoint.require_all()


def _through(change: _Change, consume: Consumer[_T]) -> Consumer[_T]:
    """A consumer that hands on to another what comes, changed on the way."""

    def consume_changed(pairs: Iterator[tuple[str, Tensor]]) -> _T:
        with closing(_changed(change, pairs)) as changed:  # one that stops early has a part of a layer in there
            return consume(changed)

    return consume_changed


def _changed(change: _Change, pairs: Iterator[tuple[str, Tensor]]) -> Parameters:
    """What fails is raised once all is gathered: a consumer may then meet other ranks, as after the last tensor."""
    try:
        yield from change(pairs)
    except Exception as e:
        clear_frames(e)
        for pair in pairs:
            del pair
        raise
