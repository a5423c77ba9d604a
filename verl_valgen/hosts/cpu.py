"""verl's trainers on a machine without CUDA or NPU: gloo, and no more than that takes.

verl asks for NCCL and an accelerator at every turn. This is for small models: examples, tests, a look at one's data
and configuration on a laptop. It is never chosen where there is an accelerator, and never silently.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from verl_valgen.patching import patched

logger = logging.getLogger(__name__)

_MEMORY_COUNTERS = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")


@contextmanager
def fsdp_sft_support(module: ModuleType, config: DictConfig) -> Iterator[None]:
    """Lets `verl.trainer.fsdp_sft_trainer` (in `module`) train on CPU while it is open."""
    import verl.utils.distributed

    logger.info("neither CUDA nor NPU here: verl runs on CPU with gloo")
    with ExitStack() as stack:
        for target, name, value in (
            (config.trainer, "device", "cpu"),
            (verl.utils.distributed, "get_nccl_backend", lambda: "gloo"),
            (module, "FSDP", _FSDPOnCPU),
            (module, "StatefulDataLoader", _loader_without_workers(module.StatefulDataLoader)),
            (module, "get_init_weight_context_manager", _weights_on_every_rank),
            # verl 0.5.0 asks torch.cpu for its memory_allocated, which there is not.
            (module, "log_gpu_memory_usage", _nothing),
        ):
            stack.enter_context(patched(target, name, value))
        yield


@contextmanager
def sft_support(module: ModuleType, config: DictConfig) -> Iterator[None]:
    """Lets `verl.trainer.sft_trainer` (in `module`) train on CPU, with the FSDP engine, while it is open."""
    import verl.utils.distributed

    logger.info("neither CUDA nor NPU here: verl runs on CPU with gloo")
    with ExitStack() as stack:
        stack.enter_context(cpu_platform())
        from verl.workers.engine.base import EngineRegistry
        from verl.workers.engine.fsdp import transformer_impl as engine

        for backend in ("fsdp", "fsdp2"):  # engines are registered for CUDA and NPU alone
            stack.enter_context(_entry(EngineRegistry._engines["language_model"][backend], "cpu", "cuda"))
        for target, name, value in (
            (config.trainer, "device", "cpu"),
            # It would ask for "cpu:gloo,cpu:gloo", which torch refuses, or for NCCL.
            (verl.utils.distributed, "initialize_global_process_group", _initialize_gloo),
            (module, "StatefulDataLoader", _loader_without_workers(module.StatefulDataLoader)),
            (engine, "device_name", "cpu"),
            (engine, "FSDP", _FSDPOnCPU),
            (engine, "get_init_weight_context_manager", _weights_on_every_rank),
            # Offloading (both ways) is done already: all parameters are in host memory at all times.
            (engine, "load_fsdp_model_to_gpu", _nothing),
            (engine, "offload_fsdp_model_to_cpu", _nothing),
            (engine, "CPUOffloadPolicy", _nothing),
            # verl takes torch.cpu for a device's module, and asks it for more than it has.
            (torch.cpu, "empty_cache", _nothing),
            (torch.cpu, "set_rng_state", torch.set_rng_state),  # on resuming
            *((torch.cpu, name, _zero) for name in _MEMORY_COUNTERS),
        ):
            stack.enter_context(patched(target, name, value))
        yield


@contextmanager
def cpu_platform() -> Iterator[None]:
    """Makes CPU the platform of verl 0.9 and later; earlier ones see for themselves that there is no other device."""
    if importlib.util.find_spec("verl.plugin") is None:
        yield
        return
    from verl.plugin.platform import get_platform, platform_manager, set_platform
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    class PlatformCPU(PlatformCUDA):
        """Of the rest (Ray, profilers, seeds) a run on CPU uses nothing, or what does nothing without CUDA."""

        device_name = "cpu"
        vendor_name = "cpu"
        device_module = torch.cpu

        def is_available(self) -> bool:
            return True

        def current_device(self) -> str:  # type: ignore[override]
            return "cpu"  # verl moves tensors to it: a number would be a CUDA device

        def set_device(self, device_index: int) -> None:
            pass

        def communication_backend_name(self) -> str:
            return "gloo"

    before = get_platform()
    # Choosing a platform while verl's trainer is imported, as its plugins do, would reach verl's own command alone:
    # a program that imports the trainer is known to be one when it calls `run_sft`. verl warns of a choice so late,
    # but before a trainer is built nothing has asked for the platform.
    with patched(platform_manager.logger, "disabled", True):
        set_platform(PlatformCPU())
    try:
        yield
    finally:
        with patched(platform_manager.logger, "disabled", True):
            set_platform(before)


@contextmanager
def _entry(mapping: dict[str, Any], key: str, same_as: str) -> Iterator[None]:
    mapping[key] = mapping[same_as]
    try:
        yield
    finally:
        del mapping[key]


def _initialize_gloo(timeout_second: int = 36000) -> tuple[int, int, int]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_second))
    return int(os.environ["LOCAL_RANK"]), dist.get_rank(), dist.get_world_size()


class _FSDPOnCPU(FSDP):
    """FSDP1 synchronises no module states on CPU ("requires communication via GPU"), so it is done here: adapters begin
    with other random weights on every rank."""

    def __init__(self, module: torch.nn.Module, **kwargs: Any) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, src=0)
        super().__init__(module, **(kwargs | {"device_id": torch.device("cpu"), "sync_module_states": False}))


def _loader_without_workers(loader_class: Any) -> Callable[..., Any]:
    def loader_without_workers(*args: Any, **kwargs: Any) -> Any:
        # Forked workers have deadlocked beside gloo's threads, and there is no device to pin memory for.
        return loader_class(*args, **(kwargs | {"num_workers": 0, "pin_memory": False, "pin_memory_device": ""}))

    return loader_without_workers


def _weights_on_every_rank(**kwargs: Any) -> type[nullcontext]:
    return nullcontext  # a context manager factory, like verl's: without it other ranks begin on the meta device


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _zero() -> int:
    return 0
