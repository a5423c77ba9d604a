"""The worker of verl's Ray trainer that answers too. Every node imports this module, so it must be installed there.

New methods alone are registered: one of verl's that is overridden is no longer among the group's. None is a coroutine,
with which Ray would run all of a worker's methods in an event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from verl.single_controller.base.decorator import Dispatch, register
from verl.workers import engine_workers
from verl.workers.engine_workers import TrainingWorker

from verl_valgen.hosts import cpu_ray, fused_kernels
from verl_valgen.hosts.engine import EngineHost, is_logging_rank_of
from verl_valgen.hosts.workers import Desk, Lines, Report
from verl_valgen.patching import patched

_ALL: Any = Dispatch.ONE_TO_ALL  # type: ignore[attr-defined]  # an enumeration that grows

_TIMEOUT_S = 36000
"""verl's own, of `initialize_global_process_group`."""


class CPUWorkerMixin:
    """Goes before `TrainingWorker`, where the driver has found neither CUDA nor NPU, and so decided for all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from verl.utils.device import is_cuda_available, is_npu_available

        if is_cuda_available or is_npu_available:
            raise RuntimeError(
                "this worker has an accelerator and the driver has none: start it on a node that has one"
            )
        # Held for the life of the process: a context manager that is collected puts back what it has changed.
        self._valgen_on_cpu = ExitStack()
        self._valgen_on_cpu.enter_context(cpu_ray.worker_support())
        super().__init__(*args, **kwargs)


class GeneratingWorkerMixin:
    """Goes before `TrainingWorker`, to answer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        make_group = engine_workers.initialize_global_process_group_ray
        with patched(engine_workers, "initialize_global_process_group_ray", _with_time_for_a_round(make_group)):
            super().__init__(*args, **kwargs)
        self._valgen_forwards = ExitStack()
        self._valgen_forwards.enter_context(fused_kernels.forwards_remembered())  # `reset` builds the model later

    @register(dispatch_mode=_ALL)
    def valgen_set_up(self, make_part: Callable[..., Any], args: Sequence[Any], level: int) -> Report:
        """Makes what `valgen_call` asks: `make_part(host, *args)`.

        Args:
            level: That of the driver's log.
        """
        worker: Any = self
        is_logging_rank = is_logging_rank_of(worker.engine)
        lines = Lines()
        lines.take_over(level if is_logging_rank else max(level, logging.WARNING))
        self._valgen_desk = Desk(worker.rank, is_logging_rank, lines)

        def make() -> Any:
            host = EngineHost(worker.engine, worker.model_config, worker.engine_config, worker.device_name)
            return make_part(host, *args)

        return self._valgen_desk.set_up(make)

    @register(dispatch_mode=_ALL)
    def valgen_call(self, name: str, *args: Any) -> Report:
        """Calls a method of what `valgen_set_up` has made."""
        return self._valgen_desk.call(name, *args)


def _with_time_for_a_round(make_group: Callable[..., Any]) -> Callable[..., Any]:
    """verl's function that makes the process group, with a time-out as long as `sft_trainer` has it.

    Without one it is torch's half an hour, in which ranks that wait for another's answers would give up.
    """

    def make(timeout_second: int | None = None, *args: Any, **kwargs: Any) -> Any:
        return make_group(_TIMEOUT_S if timeout_second is None else timeout_second, *args, **kwargs)

    return make


class CPUTrainingWorker(CPUWorkerMixin, TrainingWorker):
    """verl's worker on CPU."""


class GeneratingTrainingWorker(GeneratingWorkerMixin, TrainingWorker):
    """verl's worker, which answers too."""


class GeneratingCPUTrainingWorker(GeneratingWorkerMixin, CPUTrainingWorker):
    """Both."""


def on_cpu(worker_class: type) -> type:
    """The worker class that runs on CPU, for verl's or for what somebody has put in its place.

    The latter is pickled by value, with what it derives from by reference where that can be imported.
    """
    if worker_class is TrainingWorker:
        return CPUTrainingWorker
    return type("CPUTrainingWorker", (CPUWorkerMixin, worker_class), {})


def answering(worker_class: type) -> type:
    """The worker class that answers too; see `on_cpu`."""
    known = {TrainingWorker: GeneratingTrainingWorker, CPUTrainingWorker: GeneratingCPUTrainingWorker}
    return known.get(worker_class) or type("GeneratingTrainingWorker", (GeneratingWorkerMixin, worker_class), {})
