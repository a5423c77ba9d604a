"""Answers that are proven: on the fastest way whose answers pass the check, which stays for the run.

This module owns the choice of the way. All of its state is the same on all ranks. (Over 200 lines, as answers that are
waited for and those beside training choose among the same ways.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from verl_valgen.backends import SHARDED, Way
from verl_valgen.collectives import attempt, broadcast
from verl_valgen.hosts.model_host import ModelHost
from verl_valgen.records import Prompt, ProvenAnswers, Request
from verl_valgen.rounds.generation import Answerer, GatheredRound
from verl_valgen.rounds.links import first_link, second_link, texts_to_read
from verl_valgen.rounds.reading import Finding, Reading
from verl_valgen.rounds.verification import verify
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import OnceLogger, describe

logger = logging.getLogger(__name__)

NOT_CHECKED = Finding(None, "generation.verify switches it off")


class ProvenAnswerer:
    """An `Answerer` whose answers are read by the trainer's own model, and made again where they are not its own.

    Args:
        special_tokens: As for `Answerer`.
    """

    def __init__(
        self,
        host: ModelHost,
        settings: GenerationSettings,
        special_tokens: Callable[[], GenerationConfig] | None = None,
    ) -> None:
        self.host, self.settings = host, settings
        self.answerer = Answerer(host, settings, special_tokens)
        self.ways = list(self.answerer.ways)
        """The way in use, then the safer ones."""
        self.is_proven = False
        """Whether answers of the way in use have passed."""
        self.failed: set[Way] = set()
        """The safer ways that have failed, too. (One that could not be taken, for want of time, say, has not.)"""
        self.first_finding = NOT_CHECKED
        """What the copy of the round under way was found to be, before training went on."""
        self.safer: list[Way] = []
        """The ways that could be taken in place of that of the round under way."""
        self.is_doubted = False
        """Whether the last answers failed: then the next ones are waited for, to be made again if need be."""
        self.told: set[str] = set()
        """What was said once: why training waits, or why there is no proof."""
        self.warnings = OnceLogger(logger)

    @property
    def is_checking(self) -> bool:
        """Whether answers of the way in use are checked. Those of an engine, which is filled anew, are in any round."""
        is_due = self.settings.verify is True or not self.is_proven or self.ways[0].is_engine
        return self.settings.verify is not False and is_due

    def __call__(self, requests: Sequence[Request] | None) -> ProvenAnswers | None:
        """Answers requests in one go: gathers the weights, then generates. Collective: all ranks must call."""
        return self.finish(self.begin(requests))

    def begin(
        self, requests: Sequence[Request] | None, free_beside_training: Callable[[], float] | None = None
    ) -> GatheredRound | None:
        """See `Answerer.begin`. Collective: all ranks must call."""
        self.first_finding = NOT_CHECKED
        if free_beside_training is not None:
            reason = broadcast(self._why_not_beside_training(), self.host.is_logging_rank, self.host.device)
            if reason is not None:
                free_beside_training = None
                self._tell_once(f"generation.overlap: training waits for the answers: {reason}")
        begin = partial(self.answerer.begin, requests, self.ways[0], None, free_beside_training)
        if not self.ways[0].is_engine:
            return begin()
        gathered, error = attempt(begin)
        if (instead := self._instead(self.ways[0], error)) is None:
            return gathered
        return self.answerer.begin(requests, instead)

    def _instead(self, way: Way, error: Exception | None) -> Way | None:
        """The way that answers a round in place of an engine that failed, and a warning; None where it has not.
        Collective: all ranks must call.

        Args:
            error: On the logging rank: what the engine failed with.
        """
        reason = broadcast(None if error is None else describe(error), self.host.is_logging_rank, self.host.device)
        if reason is None:
            return None
        instead = self.ways[self.ways.index(way) + 1]
        if self.host.is_logging_rank:
            self.warnings.warn(
                f"generation.backend={way.backend}: {reason}; the answers are made by {instead.name}", cause=reason
            )
        return instead

    def _why_not_beside_training(self) -> str | None:
        """Why answers of the way in use cannot be made while training goes on; None where they can, memory apart."""
        if self.ways[0].is_engine:
            return f"generation.backend={self.ways[0].backend} takes the memory and the time of training"
        if self.host.device.type not in ("cpu", "cuda"):
            return f"beside training nobody has tried devices of type {self.host.device.type}"
        if self.ways[0] is SHARDED or self.settings.gather == "sharded":
            return "the model that is trained answers itself"
        if self.is_doubted:
            return "the last answers failed the check"
        if self.host.is_logging_rank and self.host.own_tokenizer is self.host.tokenizer:
            return "the tokenizer, which the data set uses meanwhile, cannot be copied"
        return None

    def may_go_on(self, gathered: GatheredRound, prompts: Sequence[Prompt]) -> bool:
        """Whether training may go on while a round that was made ready is answered: not where the copy reads otherwise
        than the trainer's model. `finish` then takes the safer ways. Collective: all ranks must call.

        Args:
            prompts: Those of the round, on the logging rank.
        """
        self.safer = self._safer(gathered)
        if self.is_checking:
            texts = texts_to_read(prompts, self.host.tokenizer)
            self.first_finding = first_link(self._reading(gathered), texts)
            self._log("the copy beside the trainer's model: %s", self.first_finding)
            if self.first_finding.verified is None:
                self._tell_once(
                    "generation.overlap: the copy is not compared with the trainer's model, so that answers which are "
                    f"made while training goes on stay without proof: {self.first_finding.reason}"
                )
        return self.first_finding.verified is not False

    def answer_alone(self, gathered: GatheredRound) -> tuple[ProvenAnswers, Finding]:
        """Answers on the logging rank, in a thread of its own, and has its own copy read two answers. Not collective.

        Returns:
            The answers, and what `note` is to be told of them.
        """
        completions = self.answerer.answer_alone(gathered)
        finding = self.first_finding
        if self.is_checking:
            # The special tokens were made on the trainer's thread, whose tokenizer is in use by now.
            copy: Any = gathered.model
            reading = Reading(self.host, copy.generation_config, self.settings.seed, gathered.dtype, copy)
            second = second_link(reading, gathered.requests, completions)
            self._log("the answers beside the copy: %s", second)
            # Right are those answers of which both links are.
            finding = min(finding, second, key=lambda link: {False: 0, None: 1, True: 2}[link.verified])
        return ProvenAnswers(completions, finding.verified, _name(gathered.dtype), gathered.deadline), finding

    def tell(self, finding: Finding) -> None:
        """Warns, on the logging rank, of answers that were made beside training and failed. Not collective.

        To be called before `note`, for which the other ranks are wanted: a run may end before.
        """
        if finding.verified is False:
            another = f"another way: {self.safer[0].name}" if self.safer else "the same way, as there is no other"
            self._warn(
                self.ways[0],
                f"{finding.reason}; those answers are in the JSONL files alone, without scores, and the next ones are "
                f"waited for, and made {another}",
            )

    def note(self, finding: Finding | None) -> None:
        """Takes note, on all ranks, of what came of answers that were made beside training. Collective: all must call.

        Args:
            finding: On the logging rank; None there where no answers came.
        """
        verified = broadcast(finding and finding.verified, self.host.is_logging_rank, self.host.device)
        self.is_proven = self.is_proven or verified is True
        if verified is False:
            self.is_proven, self.is_doubted = False, True
            if self.safer:  # else the next round, which is waited for, is answered and checked the same way
                self.ways = self.ways[self.ways.index(self.safer[0]) :]

    def finish(self, gathered: GatheredRound | None) -> ProvenAnswers | None:
        """Answers the requests of a gathered round, and has the answers checked. Collective: all ranks must call.

        Where they fail, they are made again on the safer ways, and the first way that passes stays for the run. Where
        none passes, the last answers are returned, unverified, and later rounds try none again that has failed. A copy
        that was found to be wrong before it has answered is made again for that.

        The check needs the weights that were gathered: the trainer must not have taken a step since.

        Returns:
            The answers on the logging rank; None elsewhere, and where there was nothing to answer.

        Raises:
            Exception: On the logging rank alone, after the last collective: what prevented the first answers.
        """
        if gathered is None:
            return None
        answers: ProvenAnswers | None = None
        verified, reason = self.first_finding
        has_answers = verified is not False
        self.is_doubted = False  # on all ranks, whatever is raised on one
        if has_answers and gathered.way.is_engine:
            result, error = attempt(partial(self._checked, gathered))
            if (instead := self._instead(gathered.way, error)) is not None:
                return self.finish(self._begun_again(gathered, instead))
            answers, verified, reason = result
        elif has_answers:
            answers, verified, reason = self._checked(gathered)
        else:
            gathered.discard()
        if verified is not False:
            self.is_proven = self.is_proven or verified is True
            return answers
        for way in self._safer(gathered):
            # What fails on the logging rank alone has ended with no check on all ranks.
            result, error = attempt(partial(self._made_again, gathered, way))
            again, verified, found = result or (None, None, describe(error) if error else "")
            self._log("%s: %s", way.name, found or "passed")
            if verified:
                self.ways, self.is_proven = self.ways[self.ways.index(way) :], True
                self.answerer.close_loaders(self.ways)
                self._warn(gathered.way, f"{reason}; the answers were made again, and will be from now on: {way.name}")
                return again
            if verified is False:
                answers, has_answers = again, True
                self.failed.add(way)
        self.is_doubted = True
        if not has_answers:
            answers = self._unproven(gathered)
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
        finding = NOT_CHECKED
        if self.is_checking:
            finding = verify(self._reading(gathered, copy), gathered.requests, completions)
        if error is not None:
            raise error
        if finding.verified is None:
            self._log("the answers are not checked against the trainer's model: %s", finding.reason)
        if completions is None:
            return None, *finding
        return ProvenAnswers(completions, finding.verified, _name(gathered.dtype), gathered.deadline), *finding

    def _reading(self, gathered: GatheredRound, copy: Any = None) -> Reading:
        """What reads a round's answers, with the round's copy or with `copy`."""
        copy = gathered.model if copy is None else copy
        return Reading(self.host, self.answerer.special_tokens(), self.settings.seed, gathered.dtype, copy)

    def _made_again(self, gathered: GatheredRound, way: Way) -> tuple[ProvenAnswers | None, bool | None, str]:
        """`_checked` for the same requests, answered another way. Collective: all ranks must call."""
        return self._checked(self._begun_again(gathered, way))

    def _begun_again(self, gathered: GatheredRound, way: Way) -> GatheredRound | None:
        """The same requests, gathered for another way. Collective: all ranks must call."""
        requests = gathered.requests if self.host.is_logging_rank else None
        return self.answerer.begin(requests, way, gathered.deadline)

    def _unproven(self, gathered: GatheredRound) -> ProvenAnswers | None:
        """Answers the same requests the same way, without a check. Collective: all ranks must call.

        Raises:
            Exception: As for `finish`.
        """
        again = self.answerer.begin(gathered.requests, gathered.way, gathered.deadline)
        completions = self.answerer.finish(again)
        if again is None or completions is None:
            return None
        return ProvenAnswers(completions, False, _name(again.dtype), again.deadline)

    def _safer(self, gathered: GatheredRound) -> list[Way]:
        """The ways after the one that a round took, without those that have failed or that are closed to it."""
        if gathered.plan.is_sharded:  # there was no room for a copy, whatever is made of it
            ways = [way for way in (SHARDED,) if gathered.way is not way]
        else:
            ways = self.ways[self.ways.index(gathered.way) + 1 :]
        closed = {SHARDED} if self.answerer.planner.why_not_sharded(gathered.requests) is not None else set()
        return [way for way in ways if way not in self.failed | closed]

    def _tell_once(self, message: str) -> None:
        if message not in self.told and self.host.is_logging_rank:
            logger.info("%s", message)
        self.told.add(message)

    def _log(self, message: str, *args: object) -> None:
        if self.host.is_logging_rank:
            logger.debug(message, *args)

    def _warn(self, way: Way, problem: str) -> None:
        if self.host.is_logging_rank:
            name = self.host.model_class.__name__
            self.warnings.warn(f"the answers of {name} ({way.name}) failed the check: {problem}", cause=problem[-40:])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
