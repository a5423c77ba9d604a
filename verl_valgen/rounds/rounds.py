"""Rounds of generation: when, and what becomes of the answers (`answering.py` makes them).

All ranks take part in a round; it ends with samples in the trackers on the logging rank. Whatever fails costs a
warning: `run` catches what answering raises, the trackers see to themselves.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from verl_valgen.collectives import broadcast
from verl_valgen.hosts.base import Host
from verl_valgen.prompts.datasets import decode, mask_is_shifted, prompts_from_batch
from verl_valgen.prompts.files import OwnPrompt
from verl_valgen.prompts.sources import read_prompts
from verl_valgen.records import Completion, Prompt
from verl_valgen.rounds.generation import Answering
from verl_valgen.rounds.preflight import single_answers
from verl_valgen.rounds.queries import Question, answered, make_questions, make_samples, place, with_global_parameters
from verl_valgen.rounds.restore import preserved_random_state
from verl_valgen.scores.aggregates import round_scalars
from verl_valgen.scores.best import Best
from verl_valgen.scores.scoring import Scoring, Verdict, with_scores
from verl_valgen.settings.load import GenerationSettings
from verl_valgen.text import describe, describe_at_length, printable
from verl_valgen.trackers import open_trackers
from verl_valgen.trackers.composite import CompositeTracker
from verl_valgen.trackers.jsonl import set_aside

logger = logging.getLogger(__name__)


class ValidationRounds:
    """The rounds of one trainer; as a context manager around its `fit()`."""

    def __init__(self, host: Host, settings: GenerationSettings, file_prompts: Sequence[OwnPrompt] = ()) -> None:
        self.host, self.settings, self.file_prompts = host, settings, file_prompts
        self.answer = Answering(host, settings)
        self.scoring = Scoring(settings.metrics)
        self.questions: list[Question] = []
        """Asked at every round; on the logging rank alone, as are trackers, scores and the best value."""
        self.steps: list[int] = []
        """Of the rounds, as they are foretold; on all ranks."""
        self.best: Best | None = None
        self.trackers: CompositeTracker | None = None
        self.warned: set[str] = set()
        self.stack = ExitStack()

    @property
    def directory(self) -> Path:
        return Path(self.host.config.trainer.default_local_dir) / "generations"

    def __enter__(self) -> None:
        """Collective: all ranks must call."""
        if self._prepare():
            self.stack.enter_context(self.host.hooked(self.run, before_train=self.settings.before_train))

    def __exit__(self, *exc_info: object) -> None:
        self.stack.close()
        self.scoring.close()
        if self.trackers is not None:
            self.trackers.close()
            self.trackers = None  # another `fit()` has runs of its own

    def _prepare(self) -> bool:
        """Says on the logging rank when samples will come, or why none will. Collective: all ranks must call.

        Returns:
            Whether there will be any, the same on all ranks.
        """
        if not self.settings.enabled:
            if self.host.is_logging_rank:
                logger.info("no samples: generation is not configured, or switched off")
            return False
        steps: list[int] | None = None
        if self.host.is_logging_rank:
            try:
                steps = self._prepare_on_logging_rank()
            except Exception as e:
                self._warn("the prompts could not be prepared, so there will be no samples", e)
        found = broadcast(steps, self.host.is_logging_rank, self.host.device)
        self.steps = found or []
        return found is not None

    def _prepare_on_logging_rank(self) -> list[int] | None:
        """The steps of the rounds; None where there is nothing to ask."""
        settings = self.settings
        prompts = read_prompts(self.host, settings, self.file_prompts)
        self.questions = make_questions(prompts, settings, self._vocab_size)
        if not self.questions:
            return None
        schedule = replace(self.host.schedule(), every=settings.every, before_train=settings.before_train)
        num_samples = sum(question.num_completions for question in self.questions)
        logger.info("%d samples %s, in %s", num_samples, schedule, self.directory)
        for line in single_answers(settings):
            logger.info("%s", line)
        self._set_earlier_samples_aside(schedule.start_step)
        if settings.best_metric:
            self.best = Best(self.directory, settings.best_metric, settings.best_mode, schedule.start_step)
        self.scoring.start()
        return schedule.round_steps()

    def _set_earlier_samples_aside(self, start_step: int) -> None:
        try:
            folder = set_aside(self.directory, start_step)
        except OSError as e:
            self._warn(f"samples of an earlier run stay in {self.directory}", e)
        else:
            if folder is not None:
                logger.info("samples of an earlier run beyond step %d were moved to %s", start_step, folder)

    def run(self, step: int) -> None:
        """One round, if it is time for one; never raises. Collective: all ranks must call."""
        if self.settings.every > 1 and step not in self.steps:
            return
        start, limit = time.time(), self.settings.max_round_time_s
        try:
            with preserved_random_state(self.host.device):
                completions = self.answer([request for question in self.questions for request in question.requests()])
                if completions is not None:
                    self._record(completions, step, time.time() - start, start + limit if limit else math.inf)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a panic of what is written in Rust is no Exception
            out_of_memory = isinstance(e, torch.OutOfMemoryError | MemoryError)
            advice = "lower generation.max_new_tokens, or set generation.gather=sharded" if out_of_memory else ""
            self._warn("no samples at this validation", e, advice)

    def _record(self, completions: Sequence[Completion], step: int, seconds: float, deadline: float) -> None:
        """Scores and logs the answers, on the logging rank, while the others go on."""
        questions = self.questions  # as they were asked
        self._take_back_what_failed(completions)
        self._warn_of_nan([completion for _, _, completion in answered(questions, completions)], step)
        dtype = str(self.answer.computed_in).removeprefix("torch.")
        samples = make_samples(questions, completions, step, self.settings.seed, dtype, self.host.tokenizer)
        verdicts: list[dict[str, Verdict]] = [{} for _ in samples]
        try:
            verdicts = self.scoring.score(samples, deadline)
        except Exception as e:  # answers without scores are better than none
            self._warn("no scores at this validation", e)
        samples = list(map(with_scores, samples, verdicts))
        trackers = self._open_trackers()
        trackers.log_samples(samples, step)
        num_tokens = sum(len(completion.output_ids) for completion in completions)
        scalars = round_scalars(list(zip(samples, verdicts, strict=True)), seconds, num_tokens)
        if self.best is not None:
            scalars |= self.best.update(scalars, step)
        trackers.log_scalars({f"val/gen/{key}": value for key, value in scalars.items()}, step)

    def _take_back_what_failed(self, completions: Sequence[Completion]) -> None:
        """Warns of requests that failed, once per cause. A row's own parameters are used no longer if they did.

        Raises:
            RuntimeError: All failed.
        """
        if all(completion.error for completion in completions):
            raise RuntimeError(completions[0].error)
        failed: dict[str, list[Question]] = {}
        for question, _, completion in answered(self.questions, completions):
            if completion.error:
                failed.setdefault(completion.error, []).append(question)
        for error, questions in failed.items():
            places = ", ".join(dict.fromkeys(place(question.index, question.prompt) for question in questions))
            self._warn_once(f"no answer to {printable(places, 200)}: {error}; training goes on", error)
        of_failed = {id(question) for questions in failed.values() for question in questions}
        self.questions = [
            with_global_parameters(question, self.settings) if id(question) in of_failed else question
            for question in self.questions
        ]

    def _warn_of_nan(self, answers: Sequence[Completion], step: int) -> None:
        if num_nan := sum(answer.had_nan for answer in answers):
            self._warn_once(
                f"{num_nan} of {len(answers)} answers at step {step} say nothing: the model's scores for the next "
                "token were NaN; training goes on",
                cause="NaN",
            )

    @property
    def _vocab_size(self) -> int:
        return self.host.model_config.get_text_config().vocab_size

    def _open_trackers(self) -> CompositeTracker:
        if self.trackers is None:  # verl opens its runs inside `fit()`
            loggers = self.host.config.trainer.logger
            self.trackers = open_trackers(
                [loggers] if isinstance(loggers, str) else list(loggers),
                directory=self.directory,
                max_log_chars=self.settings.max_log_chars,
                max_tracker_chars=self.settings.max_tracker_chars,
                best=self.best,
            )
        return self.trackers

    def generate_samples(self, batch: Any) -> tuple[list[str], list[str]]:
        """See `ValidationGenerationMixin.generate_samples`. Collective: all ranks must call."""
        tokenizer = self.host.tokenizer
        prompts: list[Prompt] = []
        questions: list[Question] = []
        error: Exception | None = None
        with preserved_random_state(self.host.device):
            if self.host.is_logging_rank:
                try:
                    prompts = self._prompts_of(batch)
                    settings = replace(self.settings, n=1, strategies={})
                    questions = make_questions(prompts, settings, self._vocab_size)
                except Exception as e:  # the others have to hear of it
                    error = e
            requests = [request for question in questions for request in question.requests()]
            completions = self.answer(None if error else requests)
        if error is not None:
            raise error
        if completions is None:
            return [], []
        answers = [completion for _, _, completion in answered(questions, completions)]
        for answer in answers:
            if answer.error:
                raise RuntimeError(answer.error)
        return (
            [decode(tokenizer, prompt.input_ids, skip_special_tokens=False) for prompt in prompts],
            [decode(tokenizer, completion.output_ids, skip_special_tokens=True) for completion in answers],
        )

    def _prompts_of(self, batch: Any) -> list[Prompt]:
        in_batch = prompts_from_batch(batch, self.host.tokenizer, shifted=mask_is_shifted(self.host.val_dataset))
        prompts = [replace(prompt, stream=i) for i, prompt in enumerate(p for p in in_batch if p is not None)]
        if len(prompts) < len(in_batch):
            self._warn_once(
                f"{len(in_batch) - len(prompts)} of the batch's {len(in_batch)} samples have images or videos, and "
                "only text is generated from: left out"
            )
        return prompts

    def _warn_once(self, message: str, cause: str = "") -> None:
        # How much memory there was, and where an object lay, differs from round to round.
        cause = re.sub(r"0x[0-9a-fA-F]+|[\d.]+(?= ?(?:[KMGT]i?B|bytes)\b)", "#", cause or message)
        if cause not in self.warned:
            self.warned.add(cause)
            logger.warning("%s", message)

    def _warn(self, what: str, error: BaseException, advice: str = "") -> None:
        """Warns once per cause; the traceback and repetitions are for DEBUG."""
        cause = describe(error)
        self._warn_once(f"{what}: {cause}{f'; {advice}' if advice else ''}; training goes on", cause)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s\n%s", what, describe_at_length(error))
