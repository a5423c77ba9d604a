"""Forward passes of the sharded model itself: to generate where no copy of it fits, and to read what a copy has said.

Every layer is gathered for every pass, and all ranks must run the same passes. This module knows FSDP and PEFT; it does
not know requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from verl_valgen.weights.structure import base_model, original_class, unwrap
from verl_valgen.weights.texts import last_logits


@contextmanager
def generating_through(wrapped: nn.Module, generation_config: Any, device: torch.device) -> Iterator[Any]:
    """Gives a model whose `generate` calls the wrapper for every forward pass, so that the root gathers its layers too.

    Entering and leaving are not collective, but `generate` is: all ranks must call it, with `synced_gpus=True`. The
    attribute `num_passes` counts this rank's forward passes. At the end the trainer's model is as it was, in its mode
    and with its parameters sharded.

    Args:
        wrapped: A transformers model under FSDP1 or FSDP2, with or without PEFT.
        generation_config: Used in place of the model's own.
        device: Where the forward pass runs; between two, parameters may lie elsewhere.

    Yields:
        The inner transformers model, in eval mode. It shares its parameters with the trainer's.
    """
    unwrapped = unwrap(wrapped)
    inner = base_model(unwrapped)
    cls: Any = original_class(inner)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.num_passes += 1
        return wrapped(*args, **kwargs)

    # `generate` calls `self(...)`. (Python looks `__call__` up in the class, so the model itself cannot have another.)
    namespace = {"__call__": call, "device": device, "num_passes": 0}
    through_class: Any = type(cls.__name__, (cls,), namespace)
    through = through_class.__new__(through_class)
    vars(through).update(vars(inner))
    through.generation_config = generation_config
    with evaluating(wrapped), _uncast_adapter_inputs(unwrapped):
        yield through


@torch.no_grad()
def read(
    wrapped: nn.Module,
    texts: Sequence[Sequence[int]],
    nums_last: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """The trainer's own logits for texts, computed as verl validates, in one pass. Collective: all ranks must call.

    A single text is without padding; several are beside each other, see `last_logits`. There is no cache. Ranks may
    read different texts.

    Args:
        wrapped: As for `generating_through`.
        texts: Token ids.
        nums_last: N of each text, the number of positions that are asked for, the last ones.
        dtype: verl's compute dtype; in another than float32 verl computes under autocast.

    Returns:
        For each text (N, V), in the dtype that the model gives. Where its forward pass cannot leave others out, the
        logits of all positions are computed on the way.
    """
    forward = original_class(base_model(unwrap(wrapped))).forward
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    with evaluating(wrapped), autocast:
        read = last_logits(wrapped, forward, texts, nums_last, device, gives_positions=True)
        return [logits.clone() for logits in read]


@contextmanager
def evaluating(wrapped: nn.Module) -> Iterator[None]:
    """While open, the model is in eval mode. At the end it is as it was, and its parameters are sharded."""
    modules = list(wrapped.modules())
    were_training = [module for module in modules if module.training]
    wrapped.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True
        # After a forward pass without a backward one FSDP keeps the root's parameters whole, in memory that training
        # counts on.
        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()
        for unit in FSDP.fsdp_modules(wrapped, root_only=True) if isinstance(wrapped, FSDP) else ():
            if unit._handle is not None and unit._handle.uses_sharded_strategy:
                unit._handle.reshard(True)


def _uncast_adapter_inputs(model: nn.Module) -> AbstractContextManager[None]:
    """Keeps PEFT from casting an adapter's input to the dtype of the adapter's weight.

    While the weight is sharded, that is the dtype it is stored in, not the one it computes in; and FSDP1 casts the
    input back only under autocast, which a training step has and `generate` has not.
    """
    if not hasattr(model, "peft_config"):
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    return disable_input_dtype_casting(model)
