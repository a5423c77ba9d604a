"""Generates through the sharded model itself, where no copy of it fits one device.

Every layer is gathered for every token, so it is slow, and all ranks must run the same forward passes. This module
knows FSDP and PEFT; it does not know requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from verl_valgen.weights.structure import base_model, original_class, unwrap


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

    was_training = [(module, module.training) for module in wrapped.modules()]
    wrapped.eval()
    try:
        with _uncast_adapter_inputs(unwrapped):
            yield through
    finally:
        for module, training in was_training:
            module.training = training
        # After a forward pass without a backward one, FSDP2 keeps the root's parameters whole: memory that training
        # counts on.
        for module in wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _uncast_adapter_inputs(model: nn.Module) -> AbstractContextManager[None]:
    """Keeps PEFT from casting an adapter's input to the dtype of the adapter's weight.

    While the weight is sharded, that is the dtype it is stored in, not the one it computes in; and FSDP1 casts the
    input back only under autocast, which a training step has and `generate` has not.
    """
    if not hasattr(model, "peft_config"):
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    return disable_input_dtype_casting(model)
