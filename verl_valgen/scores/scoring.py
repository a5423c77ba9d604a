"""Scores of samples, from metrics that run in a process of their own: one that hangs, even in C, can be left behind.

The process is a plain subprocess: multiprocessing would import verl's trainer again, as `__main__`. It is started when
training begins, so that its imports are done by the first round, and sees no GPU. This module owns the process and the
time that it is given (`worker.py` is what runs in it); it knows neither ranks nor trackers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from verl_valgen.records import Sample, Verdict
from verl_valgen.scores.metrics.functions import metric_name, parts
from verl_valgen.text import OnceLogger, describe, printable

logger = logging.getLogger(__name__)

_MAX_SCORING_S = 60.0
"""Time for the metrics of a round that has no limit of its own."""

_MAX_LOST_ROUNDS = 3
"""Rounds in a row that a metric may fail to end, or all metrics to be loaded, before it is given up."""

_MAX_KILL_S = 1.0

_ENDED = "ended the process that it ran in"


class Scoring:
    """The metrics of a run.

    Args:
        metrics: Specifications as `metrics.check_metrics` takes them.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = [_with_absolute_path(spec) for spec in metrics]
        self._process: _Worker | None = None
        self._num_lost: Counter[str] = Counter()
        """Lost rounds in a row, by metric; under "" those in which the metrics were not loaded."""
        self._log = OnceLogger(logger)

    def start(self) -> None:
        """Starts the process, if there are metrics, and does not wait for it."""
        if self.metrics and self._process is None:
            try:
                self._process = _Worker(self.metrics)
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

    def _collect(self, process: _Worker, samples: Sequence[Sample], deadline: float) -> list[dict[str, Verdict]]:
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
        where = f"row {first.row}" if first.row is not None else f"prompt {first.index + 1}"
        message = f"metric {metric}: {len(failed)} of {len(samples)} samples have no score, {where} first: {error}"
        self._log.warn(message, cause=(metric, kind))

    def _lose_all(self, process: _Worker) -> None:
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

    def _lose(self, spec: str, process: _Worker) -> None:
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


class _Worker:
    """The process of the metrics, with a thread that writes to it and reads its answers."""

    def __init__(self, metrics: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "verl_valgen.scores.worker", *metrics],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What a metric prints stays apart from the round's samples.
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_environment()},
            start_new_session=True,
        )
        self._to_send: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.is_done = False
        """Whether all samples are answered; before the first, whether the metrics are loaded."""
        self.has_ended = False
        threading.Thread(target=self._talk, name="verl-valgen-metrics", daemon=True).start()

    def send(self, samples: Sequence[Sample]) -> None:
        # A sample's own fields, not `asdict`, which would copy every list of tokens.
        records = [{f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)} for sample in samples]
        line = json.dumps(records, default=str, skipkeys=True) + "\n"
        self.is_done = False
        self._to_send.put(line)

    def receive(self, timeout_s: float) -> list[Any] | None:
        """The next answer; None after the last, or if none comes within `timeout_s`."""
        try:
            line = self._received.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        # An incomplete line is the last one of a process that was killed.
        self.has_ended = not line.endswith("\n")
        message = None if self.has_ended else json.loads(line)
        self.is_done = not self.has_ended and message is None
        return message

    def kill(self) -> None:
        """Kills the process and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk cannot even be killed
            self._process.wait(timeout=_MAX_KILL_S)

    def _talk(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            while True:
                while (line := self._process.stdout.readline().decode("ascii")) != "null\n":
                    self._received.put(line)
                    if not line:
                        return
                self._received.put(line)
                self._process.stdin.write(self._to_send.get().encode("ascii"))
                self._process.stdin.flush()
        except OSError:  # the process is gone
            self._received.put("")


def _environment() -> dict[str, str]:
    """Variables under which the process finds the modules that this one finds, and no GPU."""
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    return {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _with_absolute_path(spec: str) -> str:
    """A metric's specification whose file is found wherever the program changes its directory to."""
    name, path, function = parts(spec)
    return f"{name}={os.path.abspath(path)}:{function}" if path.endswith(".py") else spec
