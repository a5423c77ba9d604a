"""Answers that are proven: on the fastest way whose answers pass the check, which stays for the run.

This module owns the choice of the way. All of its state is the same on all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from transformers import GenerationConfig

from verl_valgen.backends import SHARDED, Way
from verl_valgen.collectives import attempt
from verl_valgen.hosts.base import Host
from verl_valgen.records import ProvenAnswers, Request
from verl_valgen.rounds.generation import Answerer, GatheredRound
from verl_valgen.rounds.reading import Finding, Reading
from verl_valgen.rounds.verification import verify
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import OnceLogger, describe

logger = logging.getLogger(__name__)


class ProvenAnswerer:
    """An `Answerer` whose answers are read by the trainer's own model, and made again where they are not its own.

    Args:
        special_tokens: As for `Answerer`.
    """

    def __init__(
        self, host: Host, settings: GenerationSettings, special_tokens: Callable[[], GenerationConfig] | None = None
    ) -> None:
        self.host, self.settings = host, settings
        self.answerer = Answerer(host, settings, special_tokens)
        self.ways = list(self.answerer.ways)
        """The way in use, then the safer ones."""
        self.is_proven = False
        """Whether answers of the way in use have passed."""
        self.failed: set[Way] = set()
        """The safer ways that have failed, too. (One that could not be taken, for want of time, say, has not.)"""
        self.warnings = OnceLogger(logger)

    def __call__(self, requests: Sequence[Request] | None) -> ProvenAnswers | None:
        """Answers requests in one go: gathers the weights, then generates. Collective: all ranks must call."""
        return self.finish(self.begin(requests))

    def begin(self, requests: Sequence[Request] | None) -> GatheredRound | None:
        """See `Answerer.begin`. Collective: all ranks must call."""
        return self.answerer.begin(requests, self.ways[0])

    def finish(self, gathered: GatheredRound | None) -> ProvenAnswers | None:
        """Answers the requests of a gathered round, and has the answers checked. Collective: all ranks must call.

        Where they fail, they are made again on the safer ways, and the first way that passes stays for the run. Where
        none passes, the last answers are returned, unverified, and later rounds try none again that has failed.

        The check needs the weights that were gathered: the trainer must not have taken a step since.

        Returns:
            The answers on the logging rank; None elsewhere, and where there was nothing to answer.

        Raises:
            Exception: On the logging rank alone, after the last collective: what prevented the first answers.
        """
        if gathered is None:
            return None
        answers, verified, reason = self._checked(gathered)
        if verified is not False:
            self.is_proven = self.is_proven or verified is True
            return answers
        for way in [way for way in self._safer(gathered) if way not in self.failed]:
            # What fails on the logging rank alone has ended with no check on all ranks.
            result, error = attempt(partial(self._made_again, gathered, way))
            again, verified, found = result or (None, None, describe(error) if error else "")
            self._log("%s: %s", way.name, found or "passed")
            if verified:
                self.ways, self.is_proven = self.ways[self.ways.index(way) :], True
                self._warn(gathered.way, f"{reason}; the answers were made again, and will be from now on: {way.name}")
                return again
            if verified is False:
                answers = again
                self.failed.add(way)
        self._warn(
            gathered.way,
            f"{reason}; no safer way does better, so the answers are in the JSONL files alone, without scores",
        )
        return None if answers is None else answers._replace(verified=False)

    def _checked(self, gathered: GatheredRound | None) -> tuple[ProvenAnswers | None, bool | None, str]:
        """The answers on the logging rank, and on all ranks whether they passed, and why not. Collective.

        Raises:
            Exception: As for `finish`; what the other ranks return is then not checked.
        """
        if gathered is None:
            return None, None, "another rank failed"
        completions, error = attempt(lambda: self.answerer.finish(gathered))
        copy, gathered.model = gathered.model, None
        finding = Finding(None, "generation.verify switches it off")
        if self.settings.verify is True or (self.settings.verify == "first" and not self.is_proven):
            reading = Reading(self.host, self.answerer.special_tokens(), self.settings.seed, gathered.dtype, copy)
            finding = verify(reading, gathered.requests, completions)
        if error is not None:
            raise error
        if finding.verified is None:
            self._log("the answers are not checked against the trainer's model: %s", finding.reason)
        if completions is None:
            return None, *finding
        dtype = str(gathered.dtype).removeprefix("torch.")
        return ProvenAnswers(completions, finding.verified, dtype, gathered.deadline), *finding

    def _made_again(self, gathered: GatheredRound, way: Way) -> tuple[ProvenAnswers | None, bool | None, str]:
        """`_checked` for the same requests, answered another way. Collective: all ranks must call."""
        requests = gathered.requests if self.host.is_logging_rank else None
        return self._checked(self.answerer.begin(requests, way, gathered.deadline))

    def _safer(self, gathered: GatheredRound) -> list[Way]:
        """The ways after the one that a round took."""
        if gathered.plan.is_sharded:  # there was no room for a copy, whatever is made of it
            return [way for way in (SHARDED,) if gathered.way is not way]
        return self.ways[self.ways.index(gathered.way) + 1 :]

    def _log(self, message: str, *args: object) -> None:
        if self.host.is_logging_rank:
            logger.debug(message, *args)

    def _warn(self, way: Way, problem: str) -> None:
        if self.host.is_logging_rank:
            name = self.host.model_class.__name__
            self.warnings.warn(f"the answers of {name} ({way.name}) failed the check: {problem}", cause=problem[-40:])
