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

from verl_valgen.collectives import gather_values, pull, together, world_size
from verl_valgen.weights.empty import empty_like
from verl_valgen.weights.full_parameters import Parameters, full_parameters, merging_names
from verl_valgen.weights.plain_copy import PlainCopy
from verl_valgen.weights.structure import unwrap

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
