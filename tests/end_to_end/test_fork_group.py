"""Forked workers do for verl's groups what Ray's do, as far as the other tests rely on it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from end_to_end.trainer import HAS_ENGINES, HAS_RAY

if not (HAS_RAY and HAS_ENGINES):
    pytest.skip("this verl has no verl.trainer.sft_trainer_ray", allow_module_level=True)

import ray
from end_to_end import fork_group
from end_to_end.fork_group import ForkGroup
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError
from verl.single_controller.base import ClassWithInitArgs, ResourcePool
from verl.single_controller.base.decorator import Dispatch, register

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

ALL: Any = Dispatch.ONE_TO_ALL
GO_ON = Path("go_on")


class SomeWorker:
    def __init__(self, first: int) -> None:
        self.rank, self.values = int(os.environ["RANK"]), [first]

    @register(dispatch_mode=ALL)
    def add(self, value: int) -> list[int]:
        self.values.append(value)
        return self.values

    @register(dispatch_mode=ALL)
    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    @register(dispatch_mode=ALL)
    def fail_on_one(self, rank: int) -> str:
        if self.rank == rank:
            raise KeyError("planted")
        while not GO_ON.exists():
            time.sleep(0.01)
        return "done"

    @register(dispatch_mode=ALL)
    def die(self, rank: int) -> None:
        if self.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def group(tmp_path, monkeypatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VERL_GENERATION_TOP_K", "7")
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(ray, "get", fork_group.get)
    group = ForkGroup(ResourcePool([2]), ClassWithInitArgs(SomeWorker, first=1))
    yield group
    GO_ON.touch()
    group.end()


def test_calls_are_done_in_order_and_values_are_copies(group):
    assert group.add(2) == [[1, 2], [1, 2]]
    group.add(3)[0].append(99)
    assert group.add(4) == [[1, 2, 3, 4]] * 2
    assert group.execute_all_sync("add", [5, 6]) == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]


def test_a_worker_knows_its_rank_and_nothing_of_the_drivers_variables(group):
    for rank, environment in enumerate(group.environment()):
        assert (environment["RANK"], environment["WORLD_SIZE"]) == (str(rank), "2")
        assert "LOCAL_RANK" not in environment
        assert not any(name.startswith("VERL_") for name in environment)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_error_is_raised_while_the_other_worker_is_busy(group, rank):
    with pytest.raises(RayTaskError) as caught:
        group.fail_on_one(rank)
    assert isinstance(caught.value, KeyError)
    reply = group.workers[1 - rank].call("add", 2)  # comes after what that one is still at
    with pytest.raises(GetTimeoutError):
        fork_group.get(reply, timeout=0)
    assert fork_group.wait_for([reply], timeout=0) == ([], [reply])
    GO_ON.touch()
    assert fork_group.get(reply) == [1, 2]


def test_a_dead_worker_fails_this_call_and_all_that_follow(group):
    for _ in range(2):
        with pytest.raises(ActorDiedError):
            group.die(1)
    assert fork_group.get(group.workers[0].call("add", 2)) == [1, 2]
