"""The process in which metrics run, as the trainer sees it; `worker.py` is the program.

It is a plain subprocess: multiprocessing would import verl's trainer again, as `__main__`. It is started when training
begins, so that its imports are done by the first round, and it sees no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from verl_valgen.records import Sample

_MAX_KILL_S = 1.0


class MetricProcess:
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
