"""The logging rank's part of the rounds: what is asked, and what becomes of the answers.

Only that rank has a `Recorder`; nothing here is collective. Trackers see to their own failures; what else fails costs a
warning and as little of the round as possible.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_valgen.prompts.answers import AnswerReader
from verl_valgen.records import Answer, ProvenAnswers, Query, Round, RoundNumbers, Sample, origin
from verl_valgen.rounds.queries import make_samples, pair, with_global_parameters
from verl_valgen.scores.aggregates import summarize_round
from verl_valgen.scores.best import FILE_NAME as BEST_FILE_NAME
from verl_valgen.scores.best import Best
from verl_valgen.scores.scoring import Scoring
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import OnceLogger, printable
from verl_valgen.trackers import open_trackers
from verl_valgen.trackers.base import TrackedRun, Tracker
from verl_valgen.trackers.composite import CompositeTracker

GOES_ON = "training goes on"


class Recorder:
    """Judges the answers of each round and hands them to the trackers.

    Args:
        queries: What every round asks; a query whose row's parameters fail is asked with the global ones from then on.
        reader: Makes texts of answers and references.
        directory: The folder of the samples.
        loggers: `trainer.logger`.
        verl_loggers: verl's own logger objects, which it makes before the first round.
        start_step: The step that the run starts from.
        prompts: Tells the prompts of the run from others; see `fingerprint`.
        run: Describes the run, for the folder.
    """

    def __init__(
        self,
        queries: Sequence[Query],
        settings: GenerationSettings,
        *,
        reader: AnswerReader,
        directory: Path,
        loggers: str | Sequence[str],
        verl_loggers: Mapping[str, Any],
        start_step: int,
        run: Mapping[str, Any] | None,
        prompts: str | None = None,
    ) -> None:
        self.queries, self.settings, self.reader = list(queries), settings, reader
        self.directory, self.loggers, self.run = directory, loggers, run
        self.verl_loggers = verl_loggers
        self.scoring = Scoring(settings.metrics)
        self.scoring.start()
        self.best = (
            Best(directory, settings.best_metric, settings.best_mode, start_step, prompts)
            if settings.best_metric
            else None
        )
        self.trackers: CompositeTracker | None = None
        self.warnings = OnceLogger(logging.getLogger(__name__))

    def judge(self, queries: Sequence[Query], proven: ProvenAnswers, step: int, seconds: float) -> Round:
        """Scores the answers of a round. Unverified ones have no scores and no numbers.

        May run beside training, in a thread of its own; one round comes after the other.

        Args:
            queries: What was asked in this round.
            proven: The answers to `make_requests(queries)`.
            seconds: How long they took.

        Raises:
            RuntimeError: All requests failed.
        """
        answers = pair(queries, proven.completions)
        self._retire_failing_parameters(answers)
        self._warn_of_nan(answers, step)
        samples = make_samples(answers, step, self.settings.seed, proven.dtype, self.reader, proven.verified)
        num_tokens = sum(len(completion.output_ids) for completion in proven.completions)
        if proven.verified is False:
            numbers = RoundNumbers(0, seconds, num_tokens / max(seconds, 1e-9))
        else:
            samples = self._scored(samples, proven.deadline)
            numbers = self._numbers(samples, step, seconds, num_tokens)
        return Round(step, samples, numbers)

    def record(self, round: Round) -> None:
        """Hands a round to the trackers, on the trainer's thread, in which some of them have their run."""
        self._open_trackers().log(round)

    def close(self) -> None:
        self.scoring.close()
        if self.trackers is not None:
            self.trackers.close()

    def _scored(self, samples: list[Sample], deadline: float) -> list[Sample]:
        try:
            return self.scoring.score(samples, deadline)
        except Exception as e:  # answers without scores are better than none
            self.warnings.warn_of_error("no scores at this validation", e, GOES_ON)
            return samples

    def _numbers(self, samples: Sequence[Sample], step: int, seconds: float, num_tokens: int) -> RoundNumbers:
        try:
            numbers = summarize_round(
                samples,
                seconds,
                num_tokens,
                strategies=list(self.settings.strategies),
                n=self.settings.n,
                logs_all=self.settings.aggregates == "all",
            )
        except Exception as e:  # samples without numbers are better than none
            self.warnings.warn_of_error("no numbers at this validation", e, GOES_ON)
            numbers = RoundNumbers(len(samples), seconds, num_tokens / max(seconds, 1e-9))
        return numbers if self.best is None else self.best.update(numbers, step)

    def _retire_failing_parameters(self, answers: Sequence[Answer]) -> None:
        """Warns of requests that failed, once per cause, and gives up the parameters of the rows concerned."""
        if all(answer.completion.error for answer in answers):
            raise RuntimeError(answers[0].completion.error)
        failed_queries: dict[str, list[Query]] = {}
        for answer in answers:
            if answer.completion.error:
                failed_queries.setdefault(answer.completion.error, []).append(answer.query)
        for error, queries in failed_queries.items():
            where = ", ".join(dict.fromkeys(origin(query.prompt) or f"prompt {query.index + 1}" for query in queries))
            self.warnings.warn(f"no answer to {printable(where, 200)}: {error}; {GOES_ON}", error)
        failed = {(query.index, query.strategy) for queries in failed_queries.values() for query in queries}
        self.queries = [
            with_global_parameters(query, self.settings) if (query.index, query.strategy) in failed else query
            for query in self.queries
        ]

    def _warn_of_nan(self, answers: Sequence[Answer], step: int) -> None:
        if num_nan := sum(answer.completion.had_nan for answer in answers):
            self.warnings.warn(
                f"{num_nan} of {len(answers)} answers at step {step} say nothing: the model's scores for the next "
                f"token were NaN; {GOES_ON}",
                cause="NaN",
            )

    def _open_trackers(self) -> CompositeTracker:
        if self.trackers is None:  # verl opens its runs inside `fit()`
            self.trackers = open_trackers(
                self.loggers,
                TrackedRun(self.directory, self.settings, self.verl_loggers, self.run),
                others={} if self.best is None else {BEST_FILE_NAME: BestFile(self.best)},
            )
        return self.trackers


class BestFile(Tracker):
    """Writes `best.json` behind the trainer, as a tracker does."""

    is_kept = True

    def __init__(self, best: Best) -> None:
        self.best = best

    def log(self, round: Round) -> None:
        self.best.write()
