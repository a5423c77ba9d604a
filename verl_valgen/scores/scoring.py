"""Scores of samples, from metrics that run in a process of their own: one that hangs, even in C, can be left behind.

This module owns the time that metrics are given, and which of them are given up; `process.py` has the process. It knows
neither ranks nor trackers.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Sequence

from verl_valgen.records import Sample, Verdict
from verl_valgen.scores.metrics.functions import metric_name, parts
from verl_valgen.scores.process import MetricProcess
from verl_valgen.text import OnceLogger, describe, printable

logger = logging.getLogger(__name__)

_MAX_SCORING_S = 60.0
"""Time for the metrics of a round that has no limit of its own."""

_MAX_LOST_ROUNDS = 3
"""Rounds in a row that a metric may fail to end, or all metrics to be loaded, before it is given up."""

_ENDED = "ended the process that it ran in"


class Scoring:
    """The metrics of a run.

    Args:
        metrics: Specifications as `metrics.check_metrics` takes them.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = [_with_absolute_path(spec) for spec in metrics]
        self._process: MetricProcess | None = None
        self._num_lost: Counter[str] = Counter()
        """Lost rounds in a row, by metric; under "" those in which the metrics were not loaded."""
        self._log = OnceLogger(logger)

    def start(self) -> None:
        """Starts the process, if there are metrics, and does not wait for it."""
        if self.metrics and self._process is None:
            try:
                self._process = MetricProcess(self.metrics)
            except OSError as e:
                self.metrics = []
                logger.warning("no scores: the process for metrics could not be started: %s", describe(e))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    def score(self, samples: Sequence[Sample], deadline: float) -> list[Sample]:
        """The samples with each metric's verdict and scores; warns of what is missing, once per cause.

        Args:
            deadline: `time.time()` at which to give up and return what there is; infinity: after a minute.
        """
        self.start()
        process = self._process
        if process is None or not samples:
            return list(samples)
        if deadline == math.inf:
            deadline = time.time() + _MAX_SCORING_S
        if not process.is_done:
            process.receive(deadline - time.time())
            if not process.is_done:
                self._lose_all(process)
                return list(samples)
        if time.time() >= deadline:
            self._log.warn("the answers left no time for metrics (see generation.max_round_time_s)", cause="")
            return list(samples)
        del self._num_lost[""]
        verdicts = self._collect(process, samples, deadline)
        return [_with_verdicts(sample, own) for sample, own in zip(samples, verdicts, strict=True)]

    def _collect(self, process: MetricProcess, samples: Sequence[Sample], deadline: float) -> list[dict[str, Verdict]]:
        """Each sample's verdicts by metric, as far as they come in time."""
        verdicts: list[dict[str, Verdict]] = [{} for _ in samples]
        failures: dict[tuple[str, str], list[tuple[int, str]]] = {}  # (metric, kind of error) -> (sample, error)
        process.send(samples)
        num_messages = 0
        while (message := process.receive(deadline - time.time())) is not None:
            num_messages += 1
            metric, i, *verdict_or_error = message
            if len(verdict_or_error) == 1:
                error = printable(str(verdict_or_error[0]), 400)
                failures.setdefault((metric, error.partition(":")[0]), []).append((i, error))
            else:
                verdicts[i][metric] = Verdict(*verdict_or_error)
        for (metric, kind), failed in failures.items():
            self._warn_of_failures(metric, kind, failed, samples)
        num_ended = num_messages // len(samples)
        for spec in self.metrics[:num_ended]:
            del self._num_lost[spec]
        if not process.is_done:
            self._lose(self.metrics[min(num_ended, len(self.metrics) - 1)], process)
        return verdicts

    def _warn_of_failures(
        self, metric: str, kind: str, failed: Sequence[tuple[int, str]], samples: Sequence[Sample]
    ) -> None:
        i, error = failed[0]
        first = samples[i]
        where = printable(first.origin or f"prompt {first.index + 1}", 300)
        message = f"metric {metric}: {len(failed)} of {len(samples)} samples have no score (first: {where}): {error}"
        self._log.warn(message, cause=(metric, kind))

    def _lose_all(self, process: MetricProcess) -> None:
        """Gives up on a round in which the metrics were not loaded; the process goes on loading for the next."""
        problem = _ENDED if process.has_ended else "were not loaded yet"
        self._log.warn(
            f"the metrics {problem}, so that samples lack scores (see generation.max_round_time_s)", cause=""
        )
        self._num_lost[""] += 1
        if self._num_lost[""] == _MAX_LOST_ROUNDS:
            logger.warning("no more scores: the metrics were not loaded in %d rounds in a row", _MAX_LOST_ROUNDS)
            self.metrics = []
        if process.has_ended or not self.metrics:
            self.close()
        self.start()

    def _lose(self, spec: str, process: MetricProcess) -> None:
        """Gives up on a metric for this round. From now on it comes last, so that it costs no other its scores."""
        metric = metric_name(spec)
        problem = _ENDED if process.has_ended else "did not end in time"
        self._log.warn(
            f"metric {metric} {problem}, so that samples lack scores (see generation.max_round_time_s)",
            cause=(metric, problem),
        )
        self.metrics.remove(spec)
        self._num_lost[spec] += 1
        if self._num_lost[spec] < _MAX_LOST_ROUNDS:
            self.metrics.append(spec)
        else:
            logger.warning("no more scores of metric %s: it failed so in %d rounds in a row", metric, _MAX_LOST_ROUNDS)
        self.close()
        self.start()


def _with_verdicts(sample: Sample, verdicts: dict[str, Verdict]) -> Sample:
    scores = {name: score for verdict in verdicts.values() for name, score in verdict.scores.items()}
    texts = {name: text for verdict in verdicts.values() for name, text in verdict.texts.items()}
    return dataclasses.replace(sample, scores={**sample.scores, **scores}, score_texts=texts, verdicts=verdicts)


def _with_absolute_path(spec: str) -> str:
    """A metric's specification whose file is found wherever the program changes its directory to."""
    name, path, function = parts(spec)
    return f"{name}={os.path.abspath(path)}:{function}" if path.endswith(".py") else spec
