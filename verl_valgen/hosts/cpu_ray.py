"""Lets `verl.trainer.sft_trainer_ray` run on a machine that has neither CUDA nor NPU: see cpu.py.

Ray is told of as many GPUs as there are workers, where it starts a cluster for this run, and there alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig

from verl_valgen.hosts.cpu import cpu_platform, engine_support, loop_support
from verl_valgen.patching import patched

logger = logging.getLogger(__name__)

_CPUS_OF_WORKER = 10
"""verl asks for so many, `max_colocate_count` of its `RayResourcePool`; they are numbers to Ray, and no cores."""
_OBJECT_STORE_BYTES = 200 * 2**20
_HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@contextmanager
def driver_support(module: ModuleType, config: DictConfig, worker_class: type) -> Iterator[None]:
    """While open, the driver of `verl.trainer.sft_trainer_ray` runs on CPU, and has workers that do.

    Args:
        module: The trainer's module, which is `__main__` under `python -m`.
        config: verl's configuration; `trainer.device` is "cpu" meanwhile.
        worker_class: With `worker_support`.
    """
    import ray

    num_workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
    logger.info("neither CUDA nor NPU here: verl runs on CPU with gloo (workers: %d)", num_workers)
    with ExitStack() as stack:
        stack.enter_context(cpu_platform())
        stack.enter_context(loop_support(module, config))
        stack.enter_context(patched(module, "TrainingWorker", worker_class))
        stack.enter_context(patched(ray, "init", _init_with_logical_gpus(ray.init, num_workers)))
        yield


@contextmanager
def worker_support() -> Iterator[None]:
    """While open, a worker of `verl.trainer.sft_trainer_ray` trains on CPU with verl's FSDP engine."""
    import verl.workers.engine_workers

    with ExitStack() as stack:
        stack.enter_context(engine_support())
        stack.enter_context(
            patched(verl.workers.engine_workers, "initialize_global_process_group_ray", _initialize_gloo_in_worker)
        )
        yield


def _initialize_gloo_in_worker(timeout_second: int | None = None, backend: str | None = None) -> None:
    """Stands in for verl's `initialize_global_process_group_ray`; without a time-out, as `_initialize_gloo` has it."""
    dist.init_process_group(
        "gloo",
        timeout=timedelta(seconds=36000 if timeout_second is None else timeout_second),
        init_method=os.environ.get("DIST_INIT_METHOD"),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def _init_with_logical_gpus(init: Callable[..., Any], num_workers: int) -> Callable[..., Any]:
    """`ray.init`, which starts a cluster here that has what verl asks of one: a GPU for each worker, and ten CPUs."""

    def ray_init(*args: Any, **kwargs: Any) -> Any:
        logical: dict[str, Any]
        address = args[0] if args else kwargs.get("address")
        if address is None:
            address = os.environ.get("RAY_ADDRESS")
        if address not in (None, "", "local"):
            return init(*args, **kwargs)
        logical = {"num_gpus": num_workers, "num_cpus": _CPUS_OF_WORKER * num_workers}
        logical["resources"] = {"cpu": num_workers}  # what verl before 0.9 asks for in the GPUs' place
        small = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        try:
            with _hidden_devices(num_workers):
                return init(*args, **(logical | small | kwargs))
        except ValueError as e:
            if "existing cluster" not in str(e):  # one runs on this machine, and has what it has
                raise
            return init(*args, **kwargs)

    return ray_init


@contextmanager
def _hidden_devices(num_workers: int) -> Iterator[None]:
    """While open, a variable that hides devices, as CUDA_VISIBLE_DEVICES without a number, has a -1 for each worker.

    Ray refuses more GPUs than the variable has entries, and gives each worker one of them. With that one, too, a worker
    sees no device.
    """
    before = {name: os.environ[name] for name in _HIDING if name in os.environ}
    os.environ.update(dict.fromkeys(before, ",".join(["-1"] * num_workers)))
    try:
        yield
    finally:
        os.environ.update(before)
