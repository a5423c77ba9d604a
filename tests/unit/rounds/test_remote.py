"""Rounds whose answers come from workers, as the driver sees them: what is fatal, and what is asked when."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen2Config

from verl_valgen.hosts.workers import BrokenGroupError, Failure, WorkerError, WorkerMemoryError
from verl_valgen.records import Completion, Prompt, ProvenAnswers, Query, Round, RoundNumbers, RowData
from verl_valgen.rounds.answerer import Answers
from verl_valgen.rounds.reading import Finding
from verl_valgen.rounds.rounds import ValidationRounds
from verl_valgen.rounds.workers_part import Begun, FromThread
from verl_valgen.settings.settings import GenerationSettings


class WorkersLost(Exception):
    """In the place of Ray's errors."""


PROVEN = ProvenAnswers([Completion([1, 2], "eos")], True, "float32", math.inf)
GIVEN = FromThread(Answers(PROVEN, Finding(True), 1.5), None)


class TheWorkers:
    """Answers by the names of the methods; raises what is an exception."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.args: dict[str, tuple[Any, ...]] = {}
        self.answers: dict[str, Any] = {"begin": Begun(False), "may_go_on": True, "finish": PROVEN}

    def call_last(self, name: str, *args: Any) -> Any:
        return self.call(name, *args)

    def call(self, name: str, *args: Any) -> Any:
        self.asked.append(name)
        self.args[name] = args
        answer = self.answers.get(name)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Recorded:
    """A recorder that keeps the rounds."""

    def __init__(self) -> None:
        prompt = Prompt(0, [5, 6], "", "yes", RowData(extra_info=lambda: None))
        self.queries = [Query(0, prompt, "default", {"do_sample": False}, 1, 1)]
        self.rounds: list[Round] = []
        self.deadlines: list[float] = []

    def judge(self, queries: Any, proven: ProvenAnswers, step: int, seconds: float) -> Round:
        self.deadlines.append(proven.deadline)
        return Round(step, [], RoundNumbers(1, seconds, 1.0))

    def record(self, round: Round) -> None:
        self.rounds.append(round)

    def close(self) -> None:
        pass


@pytest.fixture
def workers() -> TheWorkers:
    return TheWorkers()


@pytest.fixture
def rounds(workers) -> ValidationRounds:
    host: Any = SimpleNamespace(
        device=torch.device("cpu"),
        is_logging_rank=True,
        workers=workers,
        set_up_workers=lambda *args: None,
        answerer="verl_valgen.rounds.remote:RemoteAnswerer",
        fatal_errors=(WorkersLost, BrokenGroupError),
        model_config=Qwen2Config(vocab_size=10),
    )
    rounds = ValidationRounds(host, GenerationSettings(enabled=True, overlap=True))
    rounds.answerer.special_tokens = GenerationConfig  # type: ignore[attr-defined]
    rounds.recorder = Recorded()  # type: ignore[assignment]
    rounds.steps = [1, 2, 9]
    return rounds


def begin_beside(rounds: ValidationRounds, workers: TheWorkers) -> None:
    workers.answers["begin"] = Begun(True)
    rounds.run(1)
    assert rounds.under_way is not None
    workers.asked.clear()


@pytest.mark.parametrize("name", ["begin", "finish"])
def test_no_round_goes_on_without_workers(rounds, workers, name):
    workers.answers[name] = WorkersLost("a worker died")
    with pytest.raises(WorkersLost):
        rounds.run(1)


@pytest.mark.parametrize("name", ["may_go_on", "beside"])
def test_no_round_beside_training_begins_without_workers(rounds, workers, name):
    workers.answers |= {"begin": Begun(True), name: WorkersLost("a worker died")}
    with pytest.raises(WorkersLost):
        rounds.run(1)


@pytest.mark.parametrize("name", ["at_batch", "result"])
def test_no_training_goes_on_without_workers(rounds, workers, name):
    begin_beside(rounds, workers)
    workers.answers[name] = WorkersLost("a worker died")
    with pytest.raises(WorkersLost):
        (rounds.at_batch if name == "at_batch" else rounds.record_under_way)()


@pytest.mark.parametrize(
    ("error", "advice"), [(WorkerError("planted"), ""), (WorkerMemoryError("planted"), "lower generation.max_new_tok")]
)
def test_what_workers_report_is_told_and_training_goes_on(rounds, workers, caplog, error, advice):
    workers.answers["begin"] = error
    rounds.run(1)
    (record,) = caplog.records
    assert "no samples at this validation" in record.getMessage()
    assert "planted" in record.getMessage()
    assert advice in record.getMessage()
    assert record.getMessage().endswith("training goes on")
    workers.answers["begin"] = Begun(False)
    rounds.run(2)
    assert [round.step for round in rounds.recorder.rounds] == [2]


@pytest.mark.parametrize("name", ["begin", "may_go_on", "beside"])
def test_what_fails_on_one_rank_is_ended_on_all_before_anything_collective(rounds, workers, caplog, name):
    workers.answers |= {"begin": Begun(True), name: WorkerError("rank 1: planted")}
    rounds.run(1)
    assert workers.asked[-2:] == [name, "discard"]
    (record,) = caplog.records
    assert "no samples at this validation: rank 1: planted; " in record.getMessage()
    assert rounds.under_way is None
    workers.answers |= {"begin": Begun(False), name: Begun(False)}
    rounds.run(9)
    assert [round.step for round in rounds.recorder.rounds] == [9]


@pytest.mark.parametrize("name", ["begin", "finish"])
def test_a_broken_collective_ends_the_run(rounds, workers, name):
    workers.answers[name] = BrokenGroupError("Connection closed by peer")
    with pytest.raises(BrokenGroupError):
        rounds.run(1)
    assert workers.asked[-1] == name


def test_answers_that_cannot_be_asked_for_cost_one_warning(rounds, workers, caplog):
    begin_beside(rounds, workers)
    workers.answers["result"] = WorkerError("planted")
    rounds.record_under_way()
    rounds.record_under_way()
    (record,) = caplog.records
    assert "no samples of the validation at step 1: planted; training goes on" in record.getMessage()
    assert rounds.under_way is None


def test_a_prompt_that_is_asked_in_several_ways_travels_once(rounds, workers):
    (query,) = rounds.recorder.queries
    rounds.recorder.queries = [query, replace(query, strategy="other")]
    begin_beside(rounds, workers)
    (prompts,) = workers.args["may_go_on"]
    assert len(prompts) == 2
    assert prompts[0] is prompts[1]


def test_training_is_not_asked_to_wait_for_answers_beside_it(rounds, workers):
    begin_beside(rounds, workers)
    rounds.at_batch()
    assert workers.asked == ["at_batch"]
    assert not rounds.recorder.rounds
    workers.answers["at_batch"] = GIVEN
    rounds.at_batch()
    workers.answers["at_batch"] = None
    deadline = time.monotonic() + 60
    while not rounds.recorder.rounds and time.monotonic() < deadline:
        rounds.at_batch()
    (round,) = rounds.recorder.rounds
    assert round.step == 1
    assert round.numbers.seconds < 0  # they had been there for 1.5 s
    assert rounds.recorder.deadlines == [math.inf]
    assert set(workers.asked) == {"at_batch"}


def test_the_next_round_waits_for_the_one_under_way(rounds, workers):
    begin_beside(rounds, workers)
    workers.answers |= {"result": GIVEN, "begin": Begun(False)}
    rounds.run(2)
    assert workers.asked == ["result", "note", "begin", "finish"]
    assert workers.args["note"] == (Finding(True),)
    assert [round.step for round in rounds.recorder.rounds] == [1, 2]


def test_answers_that_failed_beside_training_cost_a_warning(rounds, workers, caplog):
    begin_beside(rounds, workers)
    workers.answers["result"] = FromThread(None, Failure("ValueError: planted"))
    rounds.record_under_way()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no samples of the validation at step 1" in record.getMessage()
    assert "ValueError: planted" in record.getMessage()
    assert rounds.under_way is None


@pytest.mark.parametrize("error", [WorkersLost(), KeyboardInterrupt(), RuntimeError("of verl's step")])
def test_workers_that_may_be_in_the_middle_of_a_step_are_asked_nothing_at_the_end(rounds, workers, caplog, error):
    begin_beside(rounds, workers)
    rounds.__exit__(type(error), error, None)
    assert workers.asked == []
    assert [record.getMessage() for record in caplog.records] == [
        "no samples of the validation at step 1: training ended before they were there"
    ]


def test_answers_that_are_there_at_the_end_are_recorded_without_the_workers(rounds, workers):
    begin_beside(rounds, workers)
    workers.answers["at_batch"] = GIVEN
    rounds.answerer.at_batch()
    assert rounds.under_way.answers.wait(60)
    workers.asked.clear()
    rounds.__exit__(WorkersLost, WorkersLost(), None)
    assert workers.asked == []


def test_columns_of_the_data_stay_in_the_driver(rounds, workers):
    begin_beside(rounds, workers)
    (prompts,) = workers.args["may_go_on"]
    assert [(prompt.input_ids, prompt.reference, prompt.data) for prompt in prompts] == [([5, 6], "yes", RowData())]


def test_a_bar_shows_how_long_the_workers_take(rounds, workers, monkeypatch):
    bars: list[tuple[int, bool]] = []

    def make_bar(num_answers: int, num_in_all: int, since: float, *, is_wanted: bool) -> Any:
        assert "begin" in workers.asked
        assert "finish" not in workers.asked
        assert since <= time.monotonic()
        bars.append((num_in_all, is_wanted))
        return nullcontext()

    monkeypatch.setattr("verl_valgen.rounds.remote.AnswersBar", make_bar)
    rounds.run(1)
    assert bars == [(1, True)]


def test_a_deadline_is_told_by_the_drivers_clock(rounds, workers):
    workers.answers["finish"] = PROVEN._replace(deadline=30.0)
    rounds.run(1)
    assert rounds.recorder.deadlines == [pytest.approx(time.time() + 30, abs=20)]
