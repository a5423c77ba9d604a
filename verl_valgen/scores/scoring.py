"""Scores for samples, from metrics that run in a process of their own: one that hangs, even in C, can be left behind.

That process is started when training begins, so that what it imports is loaded by the first round; it sees no GPU. This
module owns it and the time that it is given. It knows neither ranks nor trackers.
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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from verl_valgen.records import Sample
from verl_valgen.scores.metrics.functions import metric_name, parts
from verl_valgen.text import describe, printable

logger = logging.getLogger(__name__)

_MAX_SCORING_S = 60.0
"""Where a round has no limit of its own."""

_MAX_LOST_ROUNDS = 3
"""In a row, after which a metric is given up; all of them, if they are not even loaded."""

_MAX_KILL_S = 1.0

_ENDED = "ended the process that it ran in"


class Verdict(NamedTuple):
    """What one metric says of one sample."""

    scores: dict[str, float]
    is_correctness: bool | None
    """See `Metric.is_correctness`."""
    vote: str
    """See `Metric.vote`."""


class Scoring:
    """The metrics of a run.

    Args:
        metrics: As `metrics.check_metrics` takes them.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = [_absolute(spec) for spec in metrics]
        self._process: _Worker | None = None
        self._num_lost: Counter[str] = Counter()
        """Rounds in a row, by metric; "": that the metrics were not loaded in."""
        self._warned: set[str] = set()

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

    def score(self, samples: Sequence[Sample], deadline: float) -> list[dict[str, Verdict]]:
        """What each metric says of each sample, by the metric's name; warns of what is missing, once per cause.

        Args:
            deadline: `time.time()` at which to give up, with what there is by then; infinity: after a minute.
        """
        verdicts: list[dict[str, Verdict]] = [{} for _ in samples]
        self.start()
        process = self._process
        if process is None or not samples:
            return verdicts
        if deadline == math.inf:
            deadline = time.time() + _MAX_SCORING_S
        if not process.is_done:
            process.receive(deadline - time.time())
            if not process.is_done:
                self._lose_all(process)
                return verdicts
        if time.time() >= deadline:
            self._warn_once("", "the answers left no time for metrics (see generation.max_round_time_s)")
            return verdicts
        del self._num_lost[""]
        process.send(samples)
        num_answers = 0
        while (message := process.receive(deadline - time.time())) is not None:
            num_answers += 1
            metric, i, *found = message
            if len(found) == 1:
                error = printable(str(found[0]), 300)
                self._warn_once(
                    f"{metric} {error.partition(':')[0]}", f"metric {metric}: a sample has no score: {error}"
                )
            else:
                verdicts[i][metric] = Verdict(*found)
        ended = num_answers // len(samples)
        for spec in self.metrics[:ended]:
            del self._num_lost[spec]
        if not process.is_done:
            self._lose(self.metrics[min(ended, len(self.metrics) - 1)], process)
        return verdicts

    def _lose_all(self, process: _Worker) -> None:
        """A round in which the metrics were not loaded, so that one that still loads them may serve the next."""
        what = _ENDED if process.has_ended else "were not loaded yet"
        self._warn_once("", f"the metrics {what}, so that samples lack scores (see generation.max_round_time_s)")
        self._num_lost[""] += 1
        if self._num_lost[""] == _MAX_LOST_ROUNDS:
            logger.warning("no more scores: the metrics were not loaded in %d rounds in a row", _MAX_LOST_ROUNDS)
            self.metrics = []
        if process.has_ended or not self.metrics:
            self.close()
        self.start()

    def _lose(self, spec: str, process: _Worker) -> None:
        """A round that a metric did not end in. From now on it comes last, so that it costs no other its scores."""
        metric = metric_name(spec)
        what = _ENDED if process.has_ended else "did not end in time"
        self._warn_once(
            f"{metric} {what}", f"metric {metric} {what}, so that samples lack scores (see generation.max_round_time_s)"
        )
        self.metrics.remove(spec)
        self._num_lost[spec] += 1
        if self._num_lost[spec] < _MAX_LOST_ROUNDS:
            self.metrics.append(spec)
        else:
            logger.warning("no more scores of metric %s: it failed so in %d rounds in a row", metric, _MAX_LOST_ROUNDS)
        self.close()
        self.start()

    def _warn_once(self, cause: str, message: str) -> None:
        """Once per cause, of which each kind of error that a metric raises is one; the rest is for DEBUG."""
        logger.log(logging.DEBUG if cause in self._warned else logging.WARNING, "%s", message)
        self._warned.add(cause)


def with_scores(sample: Sample, verdicts: Mapping[str, Verdict]) -> Sample:
    """The sample with what its metrics say of it."""
    found = {name: score for verdict in verdicts.values() for name, score in verdict.scores.items()}
    return dataclasses.replace(sample, scores={**sample.scores, **found})


class _Worker:
    """The process, and a thread that writes to it and reads what it answers."""

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
        """Whether all is answered; before that, whether the metrics are loaded."""
        self.has_ended = False
        threading.Thread(target=self._talk, name="verl-valgen-metrics", daemon=True).start()

    def send(self, samples: Sequence[Sample]) -> None:
        fields = [{f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)} for sample in samples]
        line = json.dumps(fields, default=str, skipkeys=True) + "\n"
        self.is_done = False
        self._to_send.put(line)

    def receive(self, timeout_s: float) -> list[Any] | None:
        """The next answer; None after the last, or where there is none within `timeout_s`."""
        try:
            line = self._received.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        # A line that is not whole is the last of a process that was killed.
        self.has_ended = not line.endswith("\n")
        message = None if self.has_ended else json.loads(line)
        self.is_done = not self.has_ended and message is None
        return message

    def kill(self) -> None:
        """And whatever it has started."""
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
        except OSError:  # it is gone
            self._received.put("")


def _environment() -> dict[str, str]:
    """It finds the modules that this process finds, and no GPU."""
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    return {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _absolute(spec: str) -> str:
    """Paths are those of the program, wherever it goes later."""
    name, path, function = parts(spec)
    return f"{name}={os.path.abspath(path)}:{function}" if path.endswith(".py") else spec
