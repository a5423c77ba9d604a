"""`RoundAnswerer`: what the rounds ask of whoever answers, in this process or in workers.

A round is begun, and then either finished at once or answered beside training. What is begun is opaque to the rounds,
but for whether it may be answered beside training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple, Protocol, TypeVar

from verl_valgen.records import Prompt, ProvenAnswers, Request
from verl_valgen.rounds.reading import Finding

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Answers(NamedTuple):
    """What was answered beside training."""

    proven: ProvenAnswers
    finding: Finding
    """What is to be told of it."""
    waited_s: float = 0.0
    """How long they were there before they were asked for."""


class Gathered(Protocol):
    """A round whose weights are gathered."""

    @property
    def is_beside_training(self) -> bool:
        """Whether it was made ready to be answered while training goes on; the same on all ranks."""


G = TypeVar("G", bound=Gathered)


class Beside(Protocol[T_co]):
    """A job that is done while training goes on, see `overlap.BesideTraining`."""

    @property
    def is_done(self) -> bool: ...

    def wait(self, timeout_s: float) -> bool: ...

    def result(self) -> tuple[T_co | None, Exception | None]: ...

    def stop(self) -> None: ...


class RoundAnswerer(ABC, Generic[G]):
    """Answers the requests of rounds with the trainer's weights of the moment in which each begins.

    Where ranks run the training loop, methods that are said to be collective must be called by all of them; what they
    raise they raise on the logging rank alone, after the last collective. Random states stay as they are.
    """

    def __call__(self, requests: Sequence[Request] | None) -> ProvenAnswers | None:
        """Answers requests in one go: gathers the weights, then generates. Collective: all ranks must call."""
        return self.finish(self.begin(requests, may_overlap=False))

    @abstractmethod
    def at_batch(self) -> None:
        """To be called before each training batch, where rounds may be answered beside training."""

    @abstractmethod
    def apart_from_training(self) -> AbstractContextManager[None]:
        """While open, training waits, and memory that is allocated is none of its steps'."""

    @abstractmethod
    def begin(self, requests: Sequence[Request] | None, *, may_overlap: bool) -> G | None:
        """Gathers the weights. Collective: all ranks must call.

        Args:
            requests: On the logging rank; None there ends the call on all ranks.
            may_overlap: Whether the round may be answered while training goes on, as far as the caller knows.

        Returns:
            What the other methods want; None where there is nothing to answer, and where another rank failed.
        """

    @abstractmethod
    def may_go_on(self, gathered: G, prompts: Sequence[Prompt]) -> bool:
        """Whether training may go on while a round that was made ready is answered. Collective: all ranks must call.

        Args:
            prompts: Those of the round, on the logging rank.
        """

    @abstractmethod
    def beside(self, gathered: G, then: Callable[[Callable[[], Answers]], T]) -> Beside[T] | None:
        """Begins to answer while training goes on. To be called on all ranks.

        Args:
            then: Makes something of the answers, in a thread; the function that it is given returns or raises them.

        Returns:
            None on other ranks than the logging rank.

        Raises:
            RuntimeError: There can be no more threads.
        """

    @abstractmethod
    def let_go(self, gathered: G, *, is_done: bool) -> None:
        """Ends what `beside` began. Not collective.

        Args:
            is_done: Whether it came to an end; what a thread still holds cannot be freed.
        """

    @abstractmethod
    def finish(self, gathered: G | None) -> ProvenAnswers | None:
        """Answers now. Collective: all ranks must call.

        Returns:
            The answers on the logging rank; None elsewhere, and where there was nothing to answer.
        """

    @abstractmethod
    def tell(self, finding: Finding) -> None:
        """Warns, on the logging rank, of answers that were made beside training and failed. Not collective."""

    @abstractmethod
    def note(self, finding: Finding | None) -> None:
        """Takes note of what came of answers that were made beside training. Collective: all ranks must call.

        Args:
            finding: On the logging rank; None there where no answers came.
        """
