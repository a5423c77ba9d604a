"""Rounds of generation: when they take place, and how one goes from the gather to the record.

All ranks take part in a round; it ends with samples in the trackers on the logging rank (`recorder.py`). Whatever fails
costs a warning: `run` catches what answering raises.

With `generation.overlap` training goes on between the two ends: the logging rank answers in a thread, and what has come
of it is recorded by the trainer's thread, at the next training batch, or before whatever comes next. No collective may
stand in between, as training has its own. (Over 200 lines, as both kinds of rounds have the same two ends.)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch

from verl_valgen.collectives import attempt, broadcast
from verl_valgen.hosts.trainer_host import TrainerHost
from verl_valgen.prompts.datasets import mask_is_shifted
from verl_valgen.prompts.files import OwnPrompt
from verl_valgen.prompts.masks import prompts_from_batch
from verl_valgen.records import Prompt, Query, Round
from verl_valgen.rounds.answerer import Answers, Beside, Gathered, RoundAnswerer
from verl_valgen.rounds.preparation import prepare, vocab_size
from verl_valgen.rounds.queries import make_queries, make_requests, pair
from verl_valgen.rounds.reading import Finding
from verl_valgen.rounds.recorder import GOES_ON, Recorder
from verl_valgen.rounds.restore import preserved_random_state
from verl_valgen.rounds.wording import Wording
from verl_valgen.settings.checks import ConfigError
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import OnceLogger

logger = logging.getLogger(__name__)

_MAX_WAIT_S = 5.0
"""For answers that nobody will see, when the program is to end: a thread that still computes then may take it down."""


@dataclass(frozen=True)
class OpenRound:
    """A round between its beginning, when the weights are gathered, and its end, when the answers are recorded."""

    step: int
    started_at: float
    """`time.time()`"""
    queries: Sequence[Query]
    """The queries that were asked, on the logging rank: their parameters may be given up before this round ends."""
    gathered: Gathered | None


class RoundUnderWay(NamedTuple):
    """A round that the logging rank answers while training goes on."""

    opened: OpenRound
    gathered: Gathered
    answers: Beside[tuple[Finding, Round | None, Exception | None]]


class ValidationRounds:
    """The rounds of one trainer; as a context manager around its `fit()`.

    Args:
        file_prompts: The prompts of the file that `generation.prompts` names.
    """

    def __init__(self, host: TrainerHost, settings: GenerationSettings, file_prompts: Sequence[OwnPrompt] = ()) -> None:
        self.host, self.settings, self.file_prompts = host, settings, file_prompts
        self.wording = Wording(host, settings)
        make_answerer: Any = resolve_name(host.answerer)
        self.answerer: RoundAnswerer[Any] = make_answerer(host, settings, self.wording.special_tokens)
        self.recorder: Recorder | None = None
        """The logging rank's alone, while `fit()` runs."""
        self.steps: list[int] = []
        """The steps of the rounds, as far as they are known in advance; on all ranks."""
        self.asked_at: set[int] = set()
        """The steps of the rounds that took place, whether they gave samples or not."""
        self.warnings = OnceLogger(logger)
        self.stack = ExitStack()
        self.under_way: RoundUnderWay | None = None
        """The logging rank's alone."""
        self.is_unsettled = False
        """Whether the ranks still have to hear what came of the last answers beside training; the same on all."""
        self.found: Finding | None = None
        """That, on the logging rank."""

    def __enter__(self) -> None:
        """Prepares the rounds, and hooks them into validation. Collective: all ranks must call."""
        if self._prepare():
            at_batch = self.at_batch if self.settings.overlap else None
            hooks = self.host.hooked(self.run, before_train=self.settings.before_train, at_batch=at_batch)
            self.stack.enter_context(hooks)

    def __exit__(self, error_type: type[BaseException] | None, *exc_info: object) -> None:
        with self.stack:  # verl's runs are open until it is closed
            try:
                if error_type is not None:
                    self._abandon()
                self.record_under_way()
            except BaseException:  # Ctrl-C while it waits
                self._abandon()
                raise
            finally:
                if self.recorder is not None:
                    self.recorder.close()
                    self.recorder = None  # another `fit()` has runs of its own

    @contextmanager
    def told_if_missing(self) -> Iterator[None]:
        """At the end of `fit()`, unless it raises, the logging rank says which announced rounds did not come."""
        yield
        missing = [str(step) for step in self.steps if step not in self.asked_at]
        if missing and self.host.is_logging_rank:
            steps = ", ".join([*missing[:3], "...", missing[-1]] if len(missing) > 4 else missing)
            self.warnings.warn(
                f"no samples came at these steps, for which they were announced: {steps}; training ended "
                f"without validating there (last step with samples: {max(self.asked_at, default='none')})"
            )

    def _prepare(self) -> bool:
        """Says on the logging rank when samples will come, or why none will. Collective: all ranks must call.

        Returns:
            Whether there will be any, the same on all ranks.

        Raises:
            ConfigError: On all ranks: the data and the model show that the configuration is wrong.
        """
        if not self.settings.enabled:
            if self.host.is_logging_rank:
                logger.info("no samples: generation is not configured, or switched off")
            return False
        steps: list[int] | None = None
        mistake: str | None = None
        if self.host.is_logging_rank:
            try:
                self.recorder, steps = prepare(self.host, self.settings, self.file_prompts, self.wording, self.warnings)
            except ConfigError as e:
                mistake = str(e)
            except self.host.fatal_errors:
                raise
            except Exception as e:
                self.warnings.warn_of_error(
                    "the prompts could not be prepared, so there will be no samples", e, GOES_ON
                )
        received, mistake = broadcast([steps, mistake], self.host.is_logging_rank, self.host.device)
        if mistake is not None:
            raise ConfigError(mistake)
        self.steps, self.asked_at = received or [], set()
        return received is not None

    def run(self, step: int) -> None:
        """One round, if it is time for one; never raises. Collective: all ranks must call."""
        if self.settings.every > 1 and step not in self.steps:
            return
        self.asked_at.add(step)
        self.record_under_way()
        with self.answerer.apart_from_training(), self._failures_told("no samples at this validation"):
            self._settle()
            self._go_on_or_end(self.begin(step))

    def at_batch(self) -> None:
        """Before each training batch, on all ranks: records the answers that have been made meanwhile. Never raises."""
        with self._failures_told("the answers that are made beside training cannot be asked for"):
            self.answerer.at_batch()
        if self.under_way is not None and self.under_way.answers.is_done:
            self.record_under_way()

    @contextmanager
    def _failures_told(self, problem: str) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except self.host.fatal_errors:
            raise
        except BaseException as e:  # a panic of what is written in Rust is no Exception
            out_of_memory = isinstance(e, torch.OutOfMemoryError | MemoryError)
            advice = ["lower generation.max_new_tokens, or set generation.gather=sharded"] if out_of_memory else []
            self.warnings.warn_of_error(problem, e, *advice, GOES_ON)

    def begin(self, step: int) -> OpenRound:
        """Gathers the weights of this moment for a round. Collective: all ranks must call.

        Raises:
            Exception: On the logging rank alone, after the last collective.
        """
        started_at = time.time()
        queries = [] if self.recorder is None else self.recorder.queries
        with preserved_random_state(self.host.device):
            gathered = self.answerer.begin(make_requests(queries), may_overlap=self._may_overlap(step))
        return OpenRound(step, started_at, queries, gathered)

    def _may_overlap(self, step: int) -> bool:
        """Whether training may go on while a round is answered, as far as the round's step tells; on all ranks alike.

        After the last validation nothing is left of it, and all ranks may answer.
        """
        return self.settings.overlap and self.steps[-1:] != [step]

    def _go_on_or_end(self, opened: OpenRound) -> None:
        """Lets training go on while the round is answered, or answers it now. Collective: all ranks must call.

        Raises:
            Exception: As for `end`.
        """
        gathered = opened.gathered
        if gathered is None or not gathered.is_beside_training:
            self.end(opened)
            return
        with preserved_random_state(self.host.device):
            may_go_on = self.answerer.may_go_on(gathered, [query.prompt for query in opened.queries])
        if not may_go_on:
            self.end(opened)
            return
        self.is_unsettled = True
        answers = self.answerer.beside(gathered, partial(self._answers_and_scores, opened, self.recorder))
        if answers is not None:
            self.under_way = RoundUnderWay(opened, gathered, answers)

    def _answers_and_scores(
        self, opened: OpenRound, recorder: Recorder | None, answer: Callable[[], Answers]
    ) -> tuple[Finding, Round | None, Exception | None]:
        """What the thread does. Returns what was found of the answers, and the round, or why there is none."""
        assert recorder is not None  # only the logging rank has such a thread
        proven, finding, waited_s = answer()
        seconds = time.time() - opened.started_at - waited_s
        logger.debug("the answers of step %d took %.3f s beside training", opened.step, seconds)
        return finding, *attempt(lambda: recorder.judge(opened.queries, proven, opened.step, seconds))

    def record_under_way(self) -> None:
        """Waits for the round that is under way, if any, records it, and frees what it held. Never raises. Not
        collective."""
        if self.under_way is None:
            return
        with self._failures_told(f"no samples of the validation at step {self.under_way.opened.step}"):
            result, error = self.under_way.answers.result()
            self._let_go()
            if error is not None:
                raise error
            assert result is not None
            self.found, round, error = result
            self.answerer.tell(self.found)
            if error is not None:
                raise error
            assert round is not None
            assert self.recorder is not None
            with preserved_random_state(self.host.device):
                self.recorder.record(round)

    def _let_go(self) -> None:
        """Frees what the round held that was under way, and is done."""
        if self.under_way is not None:
            self.answerer.let_go(self.under_way.gathered, is_done=True)
            self.under_way = None

    def _settle(self) -> None:
        """Tells all ranks what came of the answers that were made beside training. Collective: all ranks must call."""
        if self.is_unsettled:
            found, self.found, self.is_unsettled = self.found, None, False
            self.answerer.note(found)

    def _abandon(self) -> None:
        """Gives up the round that is under way, unless it is done: training has failed, or somebody wants it to end."""
        if self.under_way is None or self.under_way.answers.is_done:
            return
        opened, gathered, answers = self.under_way
        answers.stop()
        logger.warning("no samples of the validation at step %d: training ended before they were there", opened.step)
        if answers.wait(_MAX_WAIT_S):
            answers.result()
            self._let_go()
        else:
            self.answerer.let_go(gathered, is_done=False)
        self.under_way = None

    def end(self, round: OpenRound) -> None:
        """Answers with the gathered weights and records. Collective: all ranks must call.

        Raises:
            Exception: On the logging rank alone, after the last collective.
        """
        with preserved_random_state(self.host.device):
            answers = self.answerer.finish(round.gathered)
            if self.recorder is not None and answers is not None:
                seconds = time.time() - round.started_at
                self.recorder.record(self.recorder.judge(round.queries, answers, round.step, seconds))

    def generate_samples(self, batch: Any) -> tuple[list[str], list[str]]:
        """See `ValidationGenerationMixin.generate_samples`. Collective: all ranks must call."""
        prompts: list[Prompt] = []
        queries: list[Query] = []
        error: Exception | None = None
        self.record_under_way()
        with self.answerer.apart_from_training(), preserved_random_state(self.host.device):
            self._settle()
            if self.host.is_logging_rank:
                try:
                    prompts = self._prompts_in(batch)
                    queries = make_queries(prompts, replace(self.settings, n=1, strategies={}), vocab_size(self.host))
                except Exception as e:  # the other ranks wait for a word
                    error = e
            proven = self.answerer(None if error else make_requests(queries))
        if error is not None:
            raise error
        if proven is None:
            return [], []
        if proven.verified is False:
            raise RuntimeError("the answers failed the check against the trainer's model")
        answers = [answer.completion for answer in pair(queries, proven.completions)]
        for answer in answers:
            if answer.error:
                raise RuntimeError(answer.error)
        reader = self.wording.reader
        return (
            [reader.prompt(prompt) for prompt in prompts],
            [
                reader.answer(prompt.input_ids, answer).generation
                for prompt, answer in zip(prompts, answers, strict=True)
            ],
        )

    def _prompts_in(self, batch: Any) -> list[Prompt]:
        is_shifted, end_ids = mask_is_shifted(self.host.val_dataset), self.wording.end_ids
        in_batch = prompts_from_batch(batch, self.host.tokenizer, shifted=is_shifted, end_ids=end_ids)
        prompts = [replace(prompt, stream=i) for i, prompt in enumerate(p for p in in_batch if p is not None)]
        if len(prompts) < len(in_batch):
            self.warnings.warn(
                f"{len(in_batch) - len(prompts)} of the batch's {len(in_batch)} samples have images or videos, and "
                "only text is generated from: left out"
            )
        return prompts
