"""The worker's class, as verl's worker group and Ray see it."""

from __future__ import annotations

import inspect
import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")
pytest.importorskip("verl.trainer.sft_trainer_ray")

from ray import cloudpickle
from ray.exceptions import ActorDiedError
from verl.single_controller.base.decorator import MAGIC_ATTR
from verl.utils.distributed import initialize_global_process_group
from verl.workers import engine_workers
from verl.workers.engine_workers import TrainingWorker

from verl_valgen.hosts import cpu_ray
from verl_valgen.hosts.ray_worker import (
    CPUTrainingWorker,
    CPUWorkerMixin,
    GeneratingCPUTrainingWorker,
    GeneratingTrainingWorker,
    GeneratingWorkerMixin,
    answering,
    on_cpu,
)
from verl_valgen.hosts.sft_ray import RaySFTHost
from verl_valgen.rounds.workers_part import WorkersPart
from verl_valgen.settings.checks import ConfigError
from verl_valgen.settings.settings import GenerationSettings


def registered(cls: type) -> dict[str, Any]:
    found = {name: getattr(cls, name) for name in dir(cls) if hasattr(getattr(cls, name, None), MAGIC_ATTR)}
    assert found
    return found


class TheirWorker(TrainingWorker):
    """What a user has put in verl's place."""


@pytest.mark.parametrize(
    "cls",
    [GeneratingTrainingWorker, GeneratingCPUTrainingWorker, answering(TheirWorker), answering(on_cpu(TheirWorker))],
)
def test_new_methods_alone_are_registered_and_none_is_a_coroutine(cls):
    before, now = registered(TrainingWorker), registered(cls)
    assert now.keys() - before.keys() == {"valgen_set_up", "valgen_call"}
    assert {name: now[name] for name in before} == before
    # One coroutine anywhere in the class makes Ray run all methods in an event loop.
    theirs = {name for name, _ in inspect.getmembers(TrainingWorker, inspect.iscoroutinefunction)}
    assert {name for name, _ in inspect.getmembers(cls, inspect.iscoroutinefunction)} == theirs


@pytest.mark.parametrize("cls", [CPUTrainingWorker, on_cpu(TheirWorker)])
def test_a_worker_on_cpu_registers_what_verls_does(cls):
    assert registered(cls) == registered(TrainingWorker)


@pytest.mark.parametrize("cls", [CPUTrainingWorker, GeneratingCPUTrainingWorker])
def test_a_worker_with_an_accelerator_does_not_compute_on_cpu_for_a_driver_without(monkeypatch, cls):
    monkeypatch.setattr("verl.utils.device.is_cuda_available", True)
    with pytest.raises(RuntimeError, match="this worker has an accelerator and the driver has none"):
        cls(None)


@pytest.mark.parametrize("cls", [GeneratingTrainingWorker, CPUTrainingWorker, GeneratingCPUTrainingWorker, WorkersPart])
def test_classes_travel_by_reference(cls):
    pickled = cloudpickle.dumps(cls)
    assert cls.__module__.encode() in pickled
    assert len(pickled) < 200
    assert cloudpickle.loads(pickled) is cls


def test_settings_travel_by_reference_of_their_class():
    settings = GenerationSettings(enabled=True, strategies={"greedy": {"do_sample": False}}, metrics=["exact_match"])
    pickled = cloudpickle.dumps(settings)
    assert GenerationSettings.__module__.encode() in pickled
    assert b"_make_skeleton_class" not in pickled  # which it would be made with, were it sent by value
    assert cloudpickle.loads(pickled) == settings


def test_a_class_in_verls_place_answers_too():
    cls = answering(TheirWorker)
    assert issubclass(cls, TheirWorker)
    assert issubclass(answering(on_cpu(TheirWorker)), TheirWorker)
    assert registered(cloudpickle.loads(cloudpickle.dumps(cls))).keys() == registered(cls).keys()


@pytest.mark.parametrize(
    ("before", "meanwhile"),
    [(TrainingWorker, GeneratingTrainingWorker), (CPUTrainingWorker, GeneratingCPUTrainingWorker)],
)
def test_the_worker_stands_in_verls_place_while_a_trainer_is_built(before, meanwhile):
    module: Any = SimpleNamespace(TrainingWorker=before)
    with RaySFTHost.while_building(module):
        assert module.TrainingWorker is meanwhile
    assert module.TrainingWorker is before


@pytest.mark.parametrize(
    "said",
    [
        "ModuleNotFoundError: No module named 'verl_valgen'",
        "ModuleNotFoundError: No module named 'verl_valgen.hosts.ray_worker'",
        "ImportError: cannot import name 'Report' from 'verl_valgen.hosts.workers' (/a/verl_valgen/hosts/workers.py)",
        "AttributeError: Can't get attribute 'WorkersPart' on <module 'verl_valgen.rounds.workers_part' from '/a.py'>",
    ],
)
def test_a_node_without_the_package_is_told_in_one_line(said):
    """The text before is Ray's, of an actor whose class cannot be unpickled."""
    error = ActorDiedError()
    error.error_msg = (
        "The actor with name GeneratingTrainingWorker failed to import on the worker. This may be because needed "
        f"library dependencies are not installed in the worker environment:\n\n{said}"
    )

    class Group:
        def valgen_set_up(self, *args: Any) -> None:
            raise error

    module: Any = SimpleNamespace(TrainingWorker=TrainingWorker)
    with pytest.raises(ConfigError) as raised, RaySFTHost.while_building(module):
        raise error
    with pytest.raises(ConfigError) as raised_later:
        RaySFTHost(trainer_of(Group())).set_up_workers(WorkersPart)
    for told in (raised, raised_later):
        assert str(told.value).startswith("a worker's node lacks verl-valgen")
        assert "\n" not in str(told.value)


class MakesAGroup:
    """As verl's worker does."""

    def __init__(self) -> None:
        engine_workers.initialize_global_process_group_ray(timeout_second=None)


VERLS_TIMEOUT_S = inspect.signature(initialize_global_process_group).parameters["timeout_second"].default
"""Of `sft_trainer`; without one torch's own is half an hour."""


def test_a_round_may_take_as_long_as_without_ray(monkeypatch):
    given: list[int] = []
    monkeypatch.setattr(
        engine_workers, "initialize_global_process_group_ray", lambda timeout_second: given.append(timeout_second)
    )
    type("Worker", (GeneratingWorkerMixin, MakesAGroup), {})()
    MakesAGroup()
    assert given == [VERLS_TIMEOUT_S, None]


def test_a_round_on_cpu_may_take_as_long(monkeypatch):
    given: list[timedelta] = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *args, timeout, **how: given.append(timeout))
    monkeypatch.setattr(
        engine_workers, "initialize_global_process_group_ray", engine_workers.initialize_global_process_group_ray
    )
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    worker: Any = type("Worker", (GeneratingWorkerMixin, CPUWorkerMixin, MakesAGroup), {})()
    worker._valgen_on_cpu.close()
    assert given == [timedelta(seconds=VERLS_TIMEOUT_S)]


def trainer_of(worker_class: type) -> Any:
    return SimpleNamespace(
        config=None, model_config=SimpleNamespace(tokenizer=None), val_dataset=None, training_client=worker_class
    )


def test_no_training_goes_on_after_an_error_of_rays():
    assert issubclass(ActorDiedError, RaySFTHost(trainer_of(GeneratingTrainingWorker)).fatal_errors)


def test_workers_that_cannot_answer_are_refused_in_words():
    with pytest.raises(TypeError, match="the workers of SimpleNamespace cannot answer: a `_build_engine` of one's own"):
        RaySFTHost(trainer_of(TrainingWorker))


def test_what_else_ends_a_worker_stays_rays():
    module: Any = SimpleNamespace(TrainingWorker=TrainingWorker)
    with pytest.raises(ActorDiedError), RaySFTHost.while_building(module):
        raise ActorDiedError()
    assert module.TrainingWorker is TrainingWorker


class Init:
    """`ray.init` where a cluster runs on this machine, or none."""

    def __init__(self, *, has_cluster: bool) -> None:
        self.has_cluster = has_cluster
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(kwargs)
        if self.has_cluster and "num_gpus" in kwargs:
            raise ValueError("When connecting to an existing cluster, num_cpus and num_gpus must not be provided.")


@pytest.mark.parametrize(
    ("has_cluster", "address", "kwargs", "expected"),
    [
        (False, None, {}, [{"num_gpus": 2, "num_cpus": 20}]),
        (False, None, {"num_gpus": 7}, [{"num_gpus": 7, "num_cpus": 20}]),
        (True, None, {}, [{"num_gpus": 2, "num_cpus": 20}, {}]),
        (True, "here:1", {}, [{}]),
        (False, "", {}, [{"num_gpus": 2, "num_cpus": 20}]),
        (False, "local", {}, [{"num_gpus": 2, "num_cpus": 20}]),
        (False, None, {"address": None}, [{"address": None, "num_gpus": 2, "num_cpus": 20}]),
        (False, "here:1", {"address": "local"}, [{"address": "local", "num_gpus": 2, "num_cpus": 20}]),
        (True, None, {"address": "here:1"}, [{"address": "here:1"}]),
    ],
)
def test_only_a_cluster_of_ones_own_gets_logical_gpus(monkeypatch, has_cluster, address, kwargs, expected):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setitem(os.environ, "RAY_ADDRESS", address)
    init = Init(has_cluster=has_cluster)
    cpu_ray._init_with_logical_gpus(init, 2)(**kwargs)
    of_cluster = ("include_dashboard", "object_store_memory", "resources")
    assert [{key: value for key, value in call.items() if key not in of_cluster} for call in init.calls] == expected
    assert all(key in init.calls[0] for key in of_cluster) == ("num_gpus" in init.calls[0])


def test_another_mistake_in_the_arguments_is_told(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def init(**kwargs: Any) -> None:
        raise ValueError("negative")

    with pytest.raises(ValueError, match="negative"):
        cpu_ray._init_with_logical_gpus(init, 2)()


@pytest.mark.parametrize("value", ["", "-1"])
def test_devices_that_are_hidden_stay_so_and_do_not_limit_the_logical_ones(monkeypatch, value):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    seen = []

    def init(**kwargs: Any) -> None:
        seen.append(dict(os.environ))
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        cpu_ray._init_with_logical_gpus(init, 2)()
    assert seen[0]["CUDA_VISIBLE_DEVICES"] == "-1,-1"
    assert "HIP_VISIBLE_DEVICES" not in seen[0]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == value
