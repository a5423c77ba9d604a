"""Lets verl's trainers run with gloo on a machine that has neither CUDA nor NPU.

verl asks for NCCL and an accelerator in many places; each is patched here while a run is open, and no others. Meant for
small models: examples, tests, a look at data and configuration on a laptop. Never chosen where there is an accelerator,
and never silently.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
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
    """While open, `verl.trainer.fsdp_sft_trainer` trains on CPU.

    Args:
        module: The trainer's module, which is `__main__` under `python -m`.
        config: verl's configuration; `trainer.device` is "cpu" meanwhile.
    """
    import verl.utils.distributed

    logger.info("neither CUDA nor NPU here: verl runs on CPU with gloo")
    with ExitStack() as stack:
        for target, name, value in (
            (config.trainer, "device", "cpu"),
            (verl.utils.distributed, "get_nccl_backend", lambda: "gloo"),
            (module, "FSDP", _FSDPOnCPU),
            (module, "StatefulDataLoader", _loader_without_workers(module.StatefulDataLoader)),
            (module, "get_init_weight_context_manager", _weights_on_every_rank),
            # verl 0.5.0 calls torch.cpu.memory_allocated, which does not exist.
            (module, "log_gpu_memory_usage", _nothing),
        ):
            stack.enter_context(patched(target, name, value))
        yield


@contextmanager
def sft_support(module: ModuleType, config: DictConfig) -> Iterator[None]:
    """While open, `verl.trainer.sft_trainer` trains on CPU with its FSDP engine.

    Args:
        module: The trainer's module, which is `__main__` under `python -m`.
        config: verl's configuration; `trainer.device` is "cpu" meanwhile.
    """
    import verl.utils.distributed

    logger.info("neither CUDA nor NPU here: verl runs on CPU with gloo")
    with ExitStack() as stack:
        stack.enter_context(engine_support())
        stack.enter_context(loop_support(module, config))
        # verl's own asks for "cpu:gloo,cpu:gloo", which torch refuses, or for NCCL.
        stack.enter_context(patched(verl.utils.distributed, "initialize_global_process_group", _initialize_gloo))
        yield


@contextmanager
def loop_support(module: ModuleType, config: DictConfig) -> Iterator[None]:
    """What the process needs that holds the training loop."""
    with ExitStack() as stack:
        stack.enter_context(patched(config.trainer, "device", "cpu"))
        loader_class = _loader_without_workers(module.StatefulDataLoader)
        stack.enter_context(patched(module, "StatefulDataLoader", loader_class))
        yield


@contextmanager
def engine_support() -> Iterator[None]:
    """What the process needs that has verl's FSDP engine."""
    with ExitStack() as stack:
        stack.enter_context(cpu_platform())
        from verl.workers.engine.base import EngineRegistry
        from verl.workers.engine.fsdp import transformer_impl as engine

        for backend in ("fsdp", "fsdp2"):  # verl registers its engines for CUDA and NPU only
            stack.enter_context(_entry(EngineRegistry._engines["language_model"][backend], "cpu", "cuda"))
        for target, name, value in (
            (engine, "device_name", "cpu"),
            (engine, "FSDP", _FSDPOnCPU),
            (engine, "get_init_weight_context_manager", _weights_on_every_rank),
            # Nothing to offload or load: all parameters are in host memory all the time.
            (engine, "load_fsdp_model_to_gpu", _nothing),
            (engine, "offload_fsdp_model_to_cpu", _nothing),
            (engine, "CPUOffloadPolicy", _nothing),
            # verl uses torch.cpu as the module of a device, which it is only in part.
            (torch.cpu, "empty_cache", _nothing),
            (torch.cpu, "set_rng_state", torch.set_rng_state),  # on resuming
            *((torch.cpu, name, _zero) for name in _MEMORY_COUNTERS),
        ):
            stack.enter_context(patched(target, name, value))
        yield


@contextmanager
def cpu_platform() -> Iterator[None]:
    """While open, CPU is verl's platform. Does nothing before verl 0.9, which finds that there is no other device."""
    if importlib.util.find_spec("verl.plugin") is None:
        yield
        return
    from verl.plugin.platform import get_platform, platform_manager, set_platform
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    class PlatformCPU(PlatformCUDA):
        """The methods that a run on CPU calls. Those it inherits (Ray, profilers, seeds) do nothing without CUDA."""

        device_name = "cpu"
        vendor_name = "cpu"
        device_module = torch.cpu

        def is_available(self) -> bool:
            return True

        def current_device(self) -> str:  # type: ignore[override]
            return "cpu"  # verl moves tensors to this: a number would mean a CUDA device

        def set_device(self, device_index: int) -> None:
            pass

        def communication_backend_name(self) -> str:
            return "gloo"

    before = get_platform()
    # verl's plugins choose the platform while the trainer is imported. That would do for verl's own command, but a
    # program that imports the trainer is recognised only when it calls `run_sft`. verl warns of so late a choice, but
    # before a trainer is built nothing has asked for the platform.
    with patched(platform_manager.logger, "disabled", True):
        set_platform(PlatformCPU())
    try:
        yield
    finally:
        with patched(platform_manager.logger, "disabled", True):
            set_platform(before)


@contextmanager
def _entry(mapping: dict[str, Any], key: str, same_as: str) -> Iterator[None]:
    """While open, `mapping` has one more key, with the value of another."""
    mapping[key] = mapping[same_as]
    try:
        yield
    finally:
        del mapping[key]


def _initialize_gloo(timeout_second: int = 36000) -> tuple[int, int, int]:
    """Stands in for verl's `initialize_global_process_group`; returns (local rank, rank, world size)."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_second))
    return int(os.environ["LOCAL_RANK"]), dist.get_rank(), dist.get_world_size()


class _FSDPOnCPU(FSDP):
    """FSDP1 that synchronises module states and offloads state dicts on CPU too, where torch's own cannot."""

    def __init__(self, module: torch.nn.Module, **kwargs: Any) -> None:
        # torch refuses `sync_module_states` ("requires communication via GPU"), and without it adapters would begin
        # with other random weights on every rank.
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, src=0)
        super().__init__(module, **(kwargs | {"device_id": torch.device("cpu"), "sync_module_states": False}))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state dict of the kind that `FSDP.state_dict_type` asks for, never offloaded. Collective."""
        settings = FSDP.get_state_dict_type(self)
        if not settings.state_dict_config.offload_to_cpu:
            return super().state_dict(*args, **kwargs)
        # torch offloads a parameter by moving it to CPU and then freeing the storage that it had, which on CPU is still
        # in use: "setStorage: ... out of bounds for storage of size 0" (torch 2.13, more than one rank). verl asks for
        # it when it saves `hf_model`.
        config = replace(settings.state_dict_config, offload_to_cpu=False)
        with FSDP.state_dict_type(self, settings.state_dict_type, config, settings.optim_state_dict_config):
            return super().state_dict(*args, **kwargs)


def _loader_without_workers(loader_class: Any) -> Callable[..., Any]:
    def loader_without_workers(*args: Any, **kwargs: Any) -> Any:
        # Forked workers can deadlock beside gloo's threads, and there is no device to pin memory for.
        return loader_class(*args, **(kwargs | {"num_workers": 0, "pin_memory": False, "pin_memory_device": ""}))

    return loader_without_workers


def _weights_on_every_rank(**kwargs: Any) -> type[nullcontext]:
    """Stands in for verl's `get_init_weight_context_manager`, with which only rank 0 would load weights."""
    return nullcontext


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _zero() -> int:
    return 0
