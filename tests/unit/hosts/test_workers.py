"""What the driver of Ray's trainer and its workers tell each other, without Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cloudpickle
import pytest
import torch

from verl_valgen.hosts.workers import BrokenGroupError, Desk, Lines, Report, WorkerError, Workers
from verl_valgen.settings.checks import ConfigError
from verl_valgen.text import describe


class Part:
    """What is asked: the logging rank is the second."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def whose(self) -> int:
        return self.rank

    def fail(self, rank: int, error: Exception) -> str:
        if rank == self.rank:
            raise error
        return "answered"

    def end(self) -> None:
        raise SystemExit(3)


class Group:
    """Three workers in this process; what comes back is pickled on the way."""

    def __init__(self) -> None:
        self.desks = [Desk(rank, rank == 1, Lines()) for rank in range(3)]

    def valgen_set_up(self, make_part: Callable[..., Any], args: Any, level: int) -> list[Report]:
        return self._sent(lambda desk: desk.set_up(lambda: make_part(desk.rank, *args)))

    def valgen_call(self, name: str, *args: Any) -> list[Report]:
        return self._sent(lambda desk: desk.call(name, *args))

    def _sent(self, ask: Callable[[Desk], Report]) -> list[Report]:
        return cloudpickle.loads(cloudpickle.dumps([ask(desk) for desk in self.desks]))


@pytest.fixture
def workers() -> Workers:
    workers = Workers(Group())
    workers.set_up(Part)
    return workers


def test_the_logging_ranks_value_comes_back(workers):
    assert workers.call("whose") == 1


@pytest.mark.parametrize(
    ("error", "is_for_memory"),
    [(ValueError("a\nb"), False), (torch.OutOfMemoryError("x"), True), (MemoryError(), True)],
)
def test_a_failure_of_the_logging_rank_is_raised_in_one_line(workers, error, is_for_memory):
    with pytest.raises(WorkerError) as raised:
        workers.call("fail", 1, error)
    assert type(error).__name__ in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, MemoryError) == is_for_memory
    assert workers.call("whose") == 1


def test_a_failure_of_another_rank_is_raised_unless_nothing_follows(workers, caplog):
    """What follows may be collective, and that rank would be missing there."""
    with pytest.raises(WorkerError, match=r"\Arank 2: ValueError: planted\Z"):
        workers.call("fail", 2, ValueError("planted"))
    for _ in range(2):
        assert workers.call_last("fail", 2, ValueError("planted")) == "answered"
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == "rank 2: ValueError: planted"


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0."),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1"),
    ],
)
def test_a_collective_that_broke_is_told_apart_on_whichever_rank(workers, rank, error):
    with pytest.raises(BrokenGroupError):
        workers.call_last("fail", rank, error)


def test_a_failure_is_described_by_what_failed(workers):
    with pytest.raises(WorkerError) as raised:
        workers.call("fail", 1, ValueError("planted"))
    assert describe(raised.value) == "ValueError: planted"


@pytest.mark.parametrize("num", [0, 2])
def test_that_there_is_no_one_logging_rank_is_told(workers, num):
    for rank, desk in enumerate(workers.group.desks):
        desk.is_logging_rank = rank < num
    with pytest.raises(WorkerError, match=f"{num} of 3 workers say that they are the logging rank"):
        workers.call("whose")


@pytest.mark.parametrize("failing", [1, 2])
def test_a_part_that_cannot_be_made_is_an_error_on_whichever_rank(workers, failing):
    def make_part(rank: int) -> None:
        if rank == failing:
            raise OSError("no part")

    with pytest.raises(WorkerError, match="OSError: no part"):
        workers.set_up(make_part)


def test_a_node_with_another_version_is_refused(workers):
    reports = workers.group.valgen_set_up(lambda rank: rank / 0, (), 0)  # it has failed, too
    workers.group.valgen_set_up = lambda *args: [replace(r, version="0.0.1") if r.rank == 2 else r for r in reports]
    with pytest.raises(ConfigError, match=r"the node of rank 2 has verl-valgen 0\.0\.1, the driver "):
        workers.set_up(Part)


def test_the_end_of_a_program_is_none_of_its_failures(workers):
    with pytest.raises(SystemExit):
        workers.call("end")


def test_what_a_worker_logs_is_logged_by_the_driver(workers, caplog):
    caplog.set_level(logging.INFO, "verl_valgen")
    for rank in (1, 2):
        record = logging.LogRecord("verl_valgen.rounds", logging.WARNING, "", 0, "%d samples", (rank,), None)
        workers.group.desks[rank].lines.emit(record)
    workers.call("whose")
    workers.call("whose")
    assert [(r.name, r.getMessage()) for r in caplog.records] == [
        ("verl_valgen.rounds", "1 samples"),
        ("verl_valgen.rounds", "rank 2: 2 samples"),
    ]
