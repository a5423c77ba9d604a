"""Answers of a model that is in workers, asked for by the driver that holds the training loop.

Each worker has a `WorkersPart`. Readings and choices happen among the workers; the driver gets answers and findings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from transformers import GenerationConfig

from verl_valgen.hosts.workers import BrokenGroupError, WorkerError, Workers
from verl_valgen.records import Prompt, ProvenAnswers, Request, RowData, pack
from verl_valgen.rounds.answerer import Answers, RoundAnswerer
from verl_valgen.rounds.answers_bar import AnswersBar
from verl_valgen.rounds.overlap import BesideTraining
from verl_valgen.rounds.reading import Finding
from verl_valgen.rounds.workers_part import Begun, FromThread, WorkersPart
from verl_valgen.settings.settings import GenerationSettings

T = TypeVar("T")

_CPU = torch.device("cpu")


class RemoteAnswerer(RoundAnswerer[Begun]):
    """Has workers answer. No method is called while they train: the driver has the result of a step before it goes on.

    Args:
        host: Has the workers; a `RaySFTHost`.
        special_tokens: As for `LocalAnswerer`.

    Raises:
        WorkerError: From any method: the workers could not, and wait for the next call.
    """

    def __init__(self, host: Any, settings: GenerationSettings, special_tokens: Callable[[], GenerationConfig]) -> None:
        self.workers: Workers = host.workers
        self.has_bar = settings.console != "none"
        self.special_tokens = special_tokens
        self.under_way: RemoteBeside[Any] | None = None
        self.num_requests, self.began_at = 0, 0.0
        """Of the round that was begun last; `time.monotonic()`."""
        host.set_up_workers(WorkersPart, settings)

    def at_batch(self) -> None:
        """Asks the workers whether the answers are there, which they say between two steps, at once."""
        answers = self.workers.call_last("at_batch")
        if answers is not None and self.under_way is not None:
            self.under_way.take(answers)

    def apart_from_training(self) -> nullcontext[None]:
        return nullcontext()  # the workers see to that

    def begin(self, requests: Sequence[Request] | None, *, may_overlap: bool) -> Begun | None:
        if not requests:
            return None
        self.num_requests, self.began_at = len(requests), time.monotonic()
        return self._call_of_a_round("begin", pack(requests), self.special_tokens(), may_overlap)

    def may_go_on(self, gathered: Begun, prompts: Sequence[Prompt]) -> bool:
        # Those are all that is read of them; a data set's columns may not be fit to travel.
        bare = {id(prompt): replace(prompt, data=RowData(), source="") for prompt in prompts}
        # One that is asked in several ways stays one: so it is read once.
        return self._call_of_a_round("may_go_on", [bare[id(prompt)] for prompt in prompts])

    def beside(self, gathered: Begun, then: Callable[[Callable[[], Answers]], T]) -> RemoteBeside[T]:
        self._call_of_a_round("beside")
        self.under_way = RemoteBeside(self.workers, then)
        return self.under_way

    def let_go(self, gathered: Begun, *, is_done: bool) -> None:
        self.under_way = None  # the workers have let go of theirs, or will when they are asked next

    def finish(self, gathered: Begun | None) -> ProvenAnswers | None:
        if gathered is None:
            return None
        # It shows how long this takes, and not how many answers are done: the workers say nothing before all are.
        with AnswersBar(self.num_requests, self.num_requests, self.began_at, is_wanted=self.has_bar):
            proven = self.workers.call_last("finish")
        return None if proven is None else _at_this_clock(proven)

    def _call_of_a_round(self, name: str, *args: Any) -> Any:
        """Calls what others calls follow upon. Where it fails on one rank, none keeps its part of the round: what is
        collective there would wait for the others for ever."""
        try:
            return self.workers.call(name, *args)
        except BrokenGroupError:
            raise
        except WorkerError:
            self.workers.call_last("discard")
            raise

    def tell(self, finding: Finding) -> None:
        pass  # the worker did, with its answers: this may be at the end of a run that workers are in the middle of

    def note(self, finding: Finding | None) -> None:
        self.workers.call("note", finding)


class RemoteBeside(Generic[T]):
    """Answers that a worker makes while training goes on, and what a thread of the driver makes of them then.

    It asks nothing of workers that may be in the middle of a step: only `result` does.
    """

    def __init__(self, workers: Workers, then: Callable[[Callable[[], Answers]], T]) -> None:
        self._workers, self._then = workers, then
        self._thread: BesideTraining[T] | None = None

    def take(self, given: FromThread | None) -> None:
        """Begins with what the worker has given."""
        self._thread = BesideTraining(partial(self._then, partial(_answers_of, given)), _CPU)

    @property
    def is_done(self) -> bool:
        return self._thread is not None and self._thread.is_done

    def wait(self, timeout_s: float) -> bool:
        """Waits for this process alone. Returns whether all is done."""
        return self._thread is not None and self._thread.wait(timeout_s)

    def result(self) -> tuple[T | None, Exception | None]:
        """See `BesideTraining.result`. To be called between two steps."""
        if self._thread is None:
            try:
                self.take(self._workers.call_last("result"))
            except BrokenGroupError:
                raise
            except WorkerError as e:
                return None, e
        assert self._thread is not None
        return self._thread.result()

    def stop(self) -> None:
        if self._thread is not None:
            self._thread.stop()


def _answers_of(given: FromThread | None) -> Answers:
    if given is None:
        raise RuntimeError("the workers have no answers any more")
    if given.failure is not None:
        raise given.failure.as_error()
    assert given.answers is not None
    return given.answers._replace(proven=_at_this_clock(given.answers.proven))


def _at_this_clock(proven: ProvenAnswers) -> ProvenAnswers:
    """With a deadline by this process's clock in place of the seconds that a worker says are left."""
    return proven._replace(deadline=proven.deadline + time.time())
