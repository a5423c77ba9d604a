"""Generating through the sharded model itself, where no copy of it fits one device.

Every layer is gathered for every token, so it is slow, and all ranks go in step. This module knows FSDP and PEFT; it
does not know requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from verl_valgen.weights.plain_copy import base_model, original_class, unwrap


@contextmanager
def generating_through(wrapped: nn.Module, generation_config: Any, device: torch.device) -> Iterator[Any]:
    """The inner transformers model, in eval mode, with calls that go through the wrapper: so the root gathers as well.

    `generate` must be called by all ranks, with `synced_gpus=True`. The attribute `num_passes` counts forward passes.

    Args:
        wrapped: A transformers model under FSDP1 or FSDP2, with or without PEFT.
        generation_config: In place of the model's own.
        device: That the forward pass runs on; parameters may lie elsewhere between two.
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
        with _inputs_of_adapters_as_they_are(unwrapped):
            yield through
    finally:
        for module, training in was_training:
            module.training = training
        # FSDP2 keeps the root's parameters whole after a forward pass without a backward one; training would find their
        # memory taken.
        for module in wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _inputs_of_adapters_as_they_are(model: nn.Module) -> AbstractContextManager[None]:
    """PEFT casts what goes into an adapter to the dtype of its weight. Of a weight that is still sharded that is the
    dtype of storage, not that of computation, and FSDP1 casts it back only under autocast, as in a training step."""
    if not hasattr(model, "peft_config"):
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    return disable_input_dtype_casting(model)
