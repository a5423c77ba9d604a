"""What a worker keeps between two calls of the driver's, and lets go of, whatever the driver does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from verl_valgen.records import ProvenAnswers, pack
from verl_valgen.rounds import workers_part
from verl_valgen.rounds.answerer import Answers
from verl_valgen.rounds.reading import Finding
from verl_valgen.rounds.workers_part import Begun, WorkersPart

PROVEN = ProvenAnswers([], True, "float32", math.inf)


class TheAnswerer:
    """Notes what it is asked, and what is held: `training waits` is there while it does."""

    def __init__(self, host: Any, settings: Any, special_tokens: Callable[[], GenerationConfig]) -> None:
        self.asked: list[str] = []
        self.held: list[str] = []
        self.error: Exception | None = None
        self.is_logging_rank = True
        self.is_done = True
        self.is_unfree = False

    @contextmanager
    def apart_from_training(self) -> Iterator[None]:
        self.held.append("training waits")
        try:
            yield
        finally:
            self.held.remove("training waits")

    def begin(self, requests: Any, *, may_overlap: bool) -> Any:
        self._ask("begin")
        self.held.append("a copy")
        return SimpleNamespace(is_beside_training=may_overlap, discard=self._free)

    def _free(self) -> None:
        self.held = [name for name in self.held if name != "a copy"]

    def may_go_on(self, gathered: Any, prompts: Any) -> bool:
        self._ask("may_go_on")
        return True

    def finish(self, gathered: Any) -> ProvenAnswers:
        gathered.discard()
        self._ask("finish")
        return PROVEN

    def beside(self, gathered: Any, then: Callable[[Callable[[], Answers]], Any]) -> Any:
        self._ask("beside")
        if not self.is_logging_rank:
            gathered.discard()
            return None
        value = then(lambda: Answers(PROVEN, Finding(True)))
        return SimpleNamespace(
            is_done=self.is_done, result=lambda: (value, self.error), stop=lambda: self.asked.append("stop")
        )

    def let_go(self, gathered: Any, *, is_done: bool) -> None:
        assert is_done
        gathered.discard()
        if self.is_unfree:
            raise OSError("not free")

    def at_batch(self) -> None:
        self._ask("at_batch")

    def tell(self, finding: Finding) -> None:
        self._ask("tell")

    def _ask(self, name: str) -> None:
        self.asked.append(name)
        if self.error is not None and name != "tell":
            raise self.error


@pytest.fixture
def part(monkeypatch) -> WorkersPart:
    monkeypatch.setattr(workers_part, "LocalAnswerer", TheAnswerer)
    host: Any = None
    settings: Any = None
    return WorkersPart(host, settings)


def begin(part: WorkersPart, *, beside: bool = False) -> Begun | None:
    return part.begin(pack([]), GenerationConfig(), beside)


def test_training_waits_from_the_beginning_to_the_end_of_a_round(part):
    assert begin(part) == Begun(False)
    assert part.answerer.held == ["training waits", "a copy"]
    assert part.finish() == PROVEN
    assert part.answerer.held == []


@pytest.mark.parametrize("name", ["begin", "may_go_on", "finish", "beside"])
def test_training_waits_no_longer_where_a_round_fails(part, name):
    if name != "begin":
        begin(part)
    part.answerer.error = RuntimeError("planted")
    with pytest.raises(RuntimeError, match="planted"):
        begin(part) if name == "begin" else getattr(part, name)(*([[]] if name == "may_go_on" else []))
    assert part.answerer.held == []
    part.discard()
    part.answerer.error = None
    assert begin(part) == Begun(False)


def test_a_round_beside_training_is_held_until_its_answers_are_asked_for(part):
    begin(part, beside=True)
    part.beside()
    assert part.answerer.held == ["a copy"]
    given = part.result()
    assert given.answers.finding == Finding(True)
    assert given.failure is None
    assert part.answerer.held == []
    assert part.result() is None


def test_between_two_steps_a_worker_says_whether_it_is_done(part):
    assert part.at_batch() is None
    part.answerer.is_done = False
    begin(part, beside=True)
    part.beside()
    assert part.at_batch() is None
    part.open.beside.is_done = True
    assert part.at_batch().answers.proven.verified is True
    assert part.at_batch() is None
    assert part.answerer.held == []


def test_what_failed_in_the_thread_travels_as_a_value(part):
    begin(part, beside=True)
    part.beside()
    part.answerer.error = ValueError("planted")
    given = part.result()
    assert given.answers is None
    assert given.failure.text == "ValueError: planted"
    assert part.answerer.held == []


def test_answers_are_given_where_what_they_held_cannot_be_freed(part, caplog):
    begin(part, beside=True)
    part.beside()
    part.answerer.is_unfree = True
    assert part.result().answers.proven.verified is True
    assert "what the answers held is not free: OSError: not free" in caplog.text


def test_training_still_waits_where_it_may_go_on(part):
    begin(part, beside=True)
    assert part.may_go_on([]) is True
    assert part.answerer.held == ["training waits", "a copy"]
    part.beside()
    assert part.answerer.held == ["a copy"]


def test_what_is_discarded_is_not_waited_for(part):
    begin(part, beside=True)
    part.discard()
    assert part.answerer.held == []
    begin(part, beside=True)
    part.beside()
    part.discard()
    assert part.answerer.held == []
    assert part.answerer.asked[-2:] == ["stop", "tell"]
    part.discard()


def test_another_rank_has_nothing_to_hold(part):
    part.answerer.is_logging_rank = False
    begin(part, beside=True)
    part.beside()
    assert part.answerer.held == []
    assert part.at_batch() is None
    assert part.result() is None


@pytest.mark.parametrize("beside", [True, False])
def test_a_driver_that_never_came_back_leaves_nothing(part, beside):
    begin(part, beside=beside)
    if beside:
        part.beside()
    assert begin(part) == Begun(False)
    assert part.answerer.held == ["training waits", "a copy"]
