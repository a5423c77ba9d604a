"""What each worker does for the driver's `RemoteAnswerer`: it has the `LocalAnswerer` of its rank and an open round."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import GenerationConfig

from verl_valgen.collectives import attempt
from verl_valgen.hosts.model_host import ModelHost
from verl_valgen.hosts.workers import Failure
from verl_valgen.records import Prompt, ProvenAnswers, unpack
from verl_valgen.rounds.answerer import Answers
from verl_valgen.rounds.generation import GatheredRound
from verl_valgen.rounds.local import LocalAnswerer
from verl_valgen.rounds.overlap import BesideTraining
from verl_valgen.rounds.reading import Finding
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import describe

logger = logging.getLogger(__name__)


class Begun(NamedTuple):
    """A round of the workers, as the driver knows it."""

    is_beside_training: bool


class FromThread(NamedTuple):
    """What came of the answers that the logging rank gave in a thread."""

    answers: Answers | None
    failure: Failure | None
    """Why there are none."""


@dataclass
class _Open:
    """The round that a worker has begun."""

    gathered: GatheredRound
    stack: ExitStack
    """Closed when training goes on."""
    beside: BesideTraining[tuple[Answers, float]] | None = None
    """Gives the answers, and `time.time()` at which they were there; on the logging rank."""


class WorkersPart:
    """A worker's end of `RemoteAnswerer`. Its methods are called on all workers alike.

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
        self.discard()  # a driver that failed in the middle of a round may go on with another
        self.given = special_tokens
        with ExitStack() as stack:
            stack.enter_context(self.answerer.apart_from_training())
            gathered = self.answerer.begin(unpack(packed), may_overlap=may_overlap)
            if gathered is None:
                return None
            self.open = _Open(gathered, stack.pop_all())
        return Begun(gathered.is_beside_training)

    def may_go_on(self, prompts: Sequence[Prompt]) -> bool:
        with self._closing() as opened:
            may_go_on = self.answerer.may_go_on(opened.gathered, prompts)
            self.open = _Open(opened.gathered, opened.stack.pop_all())
        return may_go_on

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
        _, problem = attempt(lambda: self.answerer.let_go(opened.gathered, is_done=True))
        if problem is not None:  # the answers are there all the same
            logger.warning("what the answers held is not free: %s", describe(problem))
        if error is not None or result is None:
            return FromThread(None, Failure.of(error or RuntimeError("no answers came")))
        answers, ended_at = result
        self.answerer.tell(answers.finding)
        return FromThread(Answers(_left(answers.proven), answers.finding, time.time() - ended_at), None)

    def note(self, finding: Finding | None) -> None:
        self.answerer.note(finding)

    def discard(self) -> None:
        """Ends a round that is open, without waiting for answers. Not collective."""
        if self.open is None:
            return
        if self.open.beside is not None:
            self.open.beside.stop()
            self.result()
        else:
            with self._closing() as opened:
                opened.gathered.discard()

    @contextmanager
    def _closing(self) -> Iterator[_Open]:
        """The round that is open, which is not any longer; where something fails, nothing of it stays."""
        opened, self.open = self.open, None
        if opened is None:
            raise RuntimeError("no round was begun")
        with opened.stack:
            try:
                yield opened
            except BaseException:
                opened.gathered.discard()
                raise


def _left(proven: ProvenAnswers) -> ProvenAnswers:
    """With the seconds until the deadline in its place: clocks of other nodes go differently."""
    return proven._replace(deadline=proven.deadline - time.time())
