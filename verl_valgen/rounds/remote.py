"""Answers of a model that is in workers, asked for by the driver that holds the training loop.

The driver has a `RemoteAnswerer`, each worker a `WorkersPart`, which it is made by reference and which wraps the
`LocalAnswerer` of that rank. Readings and choices happen among the workers; the driver gets answers and findings. Both
are here, as they agree on what is called with what.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from transformers import GenerationConfig

from verl_valgen.hosts.model_host import ModelHost
from verl_valgen.hosts.workers import Failure, Workers
from verl_valgen.records import Prompt, ProvenAnswers, Request, RowData, pack, unpack
from verl_valgen.rounds.answerer import Answers, RoundAnswerer
from verl_valgen.rounds.generation import GatheredRound
from verl_valgen.rounds.local import LocalAnswerer
from verl_valgen.rounds.overlap import BesideTraining
from verl_valgen.rounds.reading import Finding
from verl_valgen.settings.settings import GenerationSettings

T = TypeVar("T")

_CPU = torch.device("cpu")


class Begun(NamedTuple):
    """A round of the workers, as the driver knows it."""

    is_beside_training: bool


class FromThread(NamedTuple):
    """What came of the answers that the logging rank gave in a thread."""

    answers: Answers | None
    failure: Failure | None
    """Why there are none."""


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
        self.special_tokens = special_tokens
        self.under_way: RemoteBeside[Any] | None = None
        self.workers.set_up(WorkersPart, settings)

    def at_batch(self) -> None:
        """Asks the workers whether the answers are there, which they say between two steps, at once."""
        answers = self.workers.call("at_batch")
        if answers is not None and self.under_way is not None:
            self.under_way.take(answers)

    def apart_from_training(self) -> nullcontext[None]:
        return nullcontext()  # the workers see to that

    def begin(self, requests: Sequence[Request] | None, *, may_overlap: bool) -> Begun | None:
        if not requests:
            return None
        return self.workers.call("begin", pack(requests), self.special_tokens(), may_overlap)

    def may_go_on(self, gathered: Begun, prompts: Sequence[Prompt]) -> bool:
        # Those are all that is read of them; a data set's columns may not be fit to travel.
        bare = [replace(prompt, data=RowData(), source="") for prompt in prompts]
        return self.workers.call("may_go_on", bare)

    def beside(self, gathered: Begun, then: Callable[[Callable[[], Answers]], T]) -> RemoteBeside[T]:
        self.workers.call("beside")
        self.under_way = RemoteBeside(self.workers, then)
        return self.under_way

    def let_go(self, gathered: Begun, *, is_done: bool) -> None:
        self.under_way = None  # the workers have let go of theirs, or will when they are asked next

    def finish(self, gathered: Begun | None) -> ProvenAnswers | None:
        proven = None if gathered is None else self.workers.call("finish")
        return None if proven is None else _at_this_clock(proven)

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
            self.take(self._workers.call("result"))
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


def _left(proven: ProvenAnswers) -> ProvenAnswers:
    """With the seconds until the deadline in its place: clocks of other nodes go differently."""
    return proven._replace(deadline=proven.deadline - time.time())


def _at_this_clock(proven: ProvenAnswers) -> ProvenAnswers:
    """What `_left` was given."""
    return proven._replace(deadline=proven.deadline + time.time())


@dataclass
class _Open:
    """The round that a worker has begun."""

    gathered: GatheredRound
    stack: ExitStack
    """Closed when training goes on."""
    beside: BesideTraining[tuple[Answers, float]] | None = None
    """Gives the answers, and `time.time()` at which they were there; on the logging rank."""


class WorkersPart:
    """What each worker does for the driver's `RemoteAnswerer`. Its methods are called on all workers alike.

    What a method raises is sent to the driver, see `hosts.workers`.
    """

    def __init__(self, host: ModelHost, settings: GenerationSettings) -> None:
        self.answerer = LocalAnswerer(host, settings, self._special_tokens)
        self.given: GenerationConfig | None = None
        self.open: _Open | None = None

    def _special_tokens(self) -> GenerationConfig:
        assert self.given is not None
        return self.given

    def why_not_generating(self) -> str | None:
        return self.answerer.host.why_not_generating()

    def at_batch(self) -> FromThread | None:
        self.answerer.at_batch()
        is_done = self.open is not None and self.open.beside is not None and self.open.beside.is_done
        return self.result() if is_done else None

    def begin(self, packed: dict[str, Any], special_tokens: GenerationConfig, may_overlap: bool) -> Begun | None:
        self._end_what_is_open()
        self.given = special_tokens
        with ExitStack() as stack:
            stack.enter_context(self.answerer.apart_from_training())
            gathered = self.answerer.begin(unpack(packed), may_overlap=may_overlap)
            if gathered is None:
                return None
            self.open = _Open(gathered, stack.pop_all())
        return Begun(gathered.is_beside_training)

    def may_go_on(self, prompts: Sequence[Prompt]) -> bool:
        return self.open is not None and self.answerer.may_go_on(self.open.gathered, prompts)

    def beside(self) -> None:
        with self._closing() as opened:
            opened.beside = self.answerer.beside(opened.gathered, lambda answer: (answer(), time.time()))
            if opened.beside is not None:
                self.open = opened

    def finish(self) -> ProvenAnswers | None:
        with self._closing() as opened:
            proven = self.answerer.finish(opened.gathered)
        return None if proven is None else _left(proven)

    def result(self) -> FromThread | None:
        """Waits for the answers; None on other ranks than the logging rank."""
        opened, self.open = self.open, None
        if opened is None or opened.beside is None:
            return None
        result, error = opened.beside.result()
        self.answerer.let_go(opened.gathered, is_done=True)
        if error is not None or result is None:
            return FromThread(None, Failure.of(error or RuntimeError("no answers came")))
        answers, ended_at = result
        self.answerer.tell(answers.finding)
        return FromThread(Answers(_left(answers.proven), answers.finding, time.time() - ended_at), None)

    def note(self, finding: Finding | None) -> None:
        self.answerer.note(finding)

    @contextmanager
    def _closing(self) -> Iterator[_Open]:
        """The round that is open, which is not any longer."""
        opened, self.open = self.open, None
        if opened is None:
            raise RuntimeError("no round was begun")
        with opened.stack:
            yield opened

    def _end_what_is_open(self) -> None:
        """A driver that failed in the middle of a round may go on with another."""
        if self.open is None:
            return
        if self.open.beside is not None:
            self.result()
        else:
            with self._closing() as opened:
                opened.gathered.discard()
