"""`LocalAnswerer`: answers in the process that has the model, while training waits or beside it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from transformers import GenerationConfig

from verl_valgen.hosts.model_host import ModelHost
from verl_valgen.records import Prompt, ProvenAnswers, Request
from verl_valgen.rounds.answerer import Answers, RoundAnswerer
from verl_valgen.rounds.generation import GatheredRound
from verl_valgen.rounds.overlap import BesideTraining, TrainingMemory
from verl_valgen.rounds.proven import ProvenAnswerer
from verl_valgen.rounds.reading import Finding
from verl_valgen.rounds.restore import preserved_random_state, uncounted_objects
from verl_valgen.settings.settings import GenerationSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LocalAnswerer(RoundAnswerer[GatheredRound]):
    """A rank's part in answering.

    Args:
        special_tokens: Gives the ids that end answers, and the others.
    """

    def __init__(
        self,
        host: ModelHost,
        settings: GenerationSettings,
        special_tokens: Callable[[], GenerationConfig] | None = None,
    ) -> None:
        self.host = host
        self.proven = ProvenAnswerer(host, settings, special_tokens)
        self.memory = TrainingMemory(host.device)
        self.num_batches = 0
        """The training batches that there have been."""
        self.is_holding = False
        """Whether a round is answered beside training on this rank."""

    def at_batch(self) -> None:
        self.num_batches += 1
        self.memory.note()

    @contextmanager
    def apart_from_training(self) -> Iterator[None]:
        """Before the first step what is allocated counts as training's all the same, as nothing else is known."""
        self.memory.note()
        try:
            yield
        finally:
            if self.num_batches > 0 and not self.is_holding:
                self.memory.leave_out()

    def begin(self, requests: Sequence[Request] | None, *, may_overlap: bool) -> GatheredRound | None:
        """Before the first training step nobody knows what memory training takes: then it waits."""
        self.memory.before_gather()
        free = self.memory.free_bytes if may_overlap and self.num_batches > 0 else None
        with preserved_random_state(self.host.device), uncounted_objects():
            return self.proven.begin(requests, free)

    def may_go_on(self, gathered: GatheredRound, prompts: Sequence[Prompt]) -> bool:
        with preserved_random_state(self.host.device):
            return self.proven.may_go_on(gathered, prompts)

    def beside(self, gathered: GatheredRound, then: Callable[[Callable[[], Answers]], T]) -> BesideTraining[T] | None:
        if not self.host.is_logging_rank:
            gathered.discard()
            return None
        self.memory.begin_holding()
        self.is_holding = True
        try:
            job = partial(then, lambda: Answers(*self.proven.answer_alone(gathered)))
            answers = BesideTraining(job, self.host.device)
        except RuntimeError:  # no more threads
            self.let_go(gathered, is_done=True)
            raise
        _log_waits(gathered)
        return answers

    def let_go(self, gathered: GatheredRound, *, is_done: bool) -> None:
        """What a thread still holds counts as training's from then on."""
        self.memory.end_holding()
        self.is_holding = False
        if is_done:
            gathered.discard()

    def finish(self, gathered: GatheredRound | None) -> ProvenAnswers | None:
        with preserved_random_state(self.host.device):
            return self.proven.finish(gathered)

    def tell(self, finding: Finding) -> None:
        self.proven.tell(finding)

    def note(self, finding: Finding | None) -> None:
        self.proven.note(finding)


def _log_waits(gathered: GatheredRound) -> None:
    now, began_at = time.monotonic(), gathered.began_at
    logger.debug(
        "training waited %.3f s: gather %.3f, until ready %.3f, comparison with the trainer's model %.3f",
        now - began_at,
        gathered.gathered_at - began_at,
        gathered.ready_at - gathered.gathered_at,
        now - gathered.ready_at,
    )
