"""verl's trainers on a machine without CUDA or NPU: gloo, and no more than that takes.

verl asks for NCCL and an accelerator at every turn. This is for small models: examples, tests, a look at one's data
and configuration on a laptop. It is never chosen where there is an accelerator, and never silently.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from verl_valgen.patching import patched

logger = logging.getLogger(__name__)


@contextmanager
def fsdp_sft_support(module: ModuleType, config: DictConfig) -> Iterator[None]:
    """Lets `verl.trainer.fsdp_sft_trainer` (in `module`) train on CPU while it is open."""
    import verl.utils.distributed

    logger.info("neither CUDA nor NPU here: verl runs on CPU with gloo")
    fsdp_class, loader_class = module.FSDP, module.StatefulDataLoader

    def fsdp_on_cpu(model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        # FSDP1 synchronises no module states on CPU ("requires communication via GPU"), so it is done here: adapters
        # begin with other random weights on every rank.
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, src=0)
        kwargs |= {"device_id": torch.device("cpu"), "sync_module_states": False}
        return fsdp_class(model, **kwargs)

    def loader_without_workers(*args: Any, **kwargs: Any) -> Any:
        # Forked workers have deadlocked beside gloo's threads, and there is no device to pin memory for.
        return loader_class(*args, **(kwargs | {"num_workers": 0, "pin_memory": False, "pin_memory_device": ""}))

    def weights_on_every_rank(**kwargs: Any) -> type[nullcontext]:
        return nullcontext  # a context manager factory, like verl's: without it other ranks begin on the meta device

    with ExitStack() as stack:
        for target, name, value in (
            (config.trainer, "device", "cpu"),
            (verl.utils.distributed, "get_nccl_backend", lambda: "gloo"),
            (module, "FSDP", fsdp_on_cpu),
            (module, "StatefulDataLoader", loader_without_workers),
            (module, "get_init_weight_context_manager", weights_on_every_rank),
            # verl 0.5.0 asks torch.cpu for its memory_allocated, which there is not.
            (module, "log_gpu_memory_usage", lambda *args, **kwargs: None),
        ):
            stack.enter_context(patched(target, name, value))
        yield
