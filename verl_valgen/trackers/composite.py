"""All destinations as one, and the error policy of this layer.

A tracker that fails costs a warning, never a training step: this is the one place that catches what an open tracker
raises. There is one warning per tracker and kind of error. A tracker whose calls fail three times running is given up,
unless it says otherwise, as what writes files does.

Any of them may hang, a folder on a dead disk too. So each has a thread of its own, which is waited for a moment: what
takes longer goes on behind the trainer, and comes late. An error of such a call comes back with a later one.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from verl_valgen.records import Sample
from verl_valgen.text import describe
from verl_valgen.trackers.background import BackgroundQueue
from verl_valgen.trackers.base import Tracker

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3

_MAX_PENDING_CALLS = 64
"""Of one tracker; the oldest is dropped for one more."""

_MAX_WAIT_S = 0.8
"""Of a round, for all trackers together."""
_MIN_WAIT_S = 0.15
"""Of a call, so that who has nothing to do is not late where another was."""
_MAX_CLOSE_S = 5.0
"""For all trackers together. A process takes some seconds more to end."""


class CompositeTracker(Tracker):
    """Hands everything on to each tracker. Raises nothing but what ends the program, such as Ctrl-C."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self.trackers = dict(trackers)
        """Those still in use, by name."""
        self._queues = {name: BackgroundQueue(name, _MAX_PENDING_CALLS) for name in trackers}
        self._wait_until = 0.0
        self._late: set[str] = set()
        self._num_failures: Counter[tuple[str, str]] = Counter()
        self._warned: set[tuple[str, type[Exception], int | None]] = set()

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """The first call of a round."""
        self._wait_until = time.monotonic() + _MAX_WAIT_S
        self._call_each("log_samples", lambda tracker: tracker.log_samples(samples, step))

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        self._call_each("log_scalars", lambda tracker: tracker.log_scalars(scalars, step))

    def close(self) -> None:
        """Waits for what is still under way, within `_MAX_CLOSE_S` in all."""
        deadline = time.monotonic() + _MAX_CLOSE_S
        for name, tracker in self.trackers.items():
            with self._failures_told(name):
                self._queues[name].submit(tracker.close)
        for name in self.trackers:
            with self._failures_told(name):
                self._queues[name].drain(max(0.0, deadline - time.monotonic()))

    @contextmanager
    def _failures_told(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._warn_once(name, error)

    def _call_each(self, method: str, call: Callable[[Tracker], None]) -> None:
        failed = {}
        for name, tracker in self.trackers.items():
            try:
                self._queues[name].submit(partial(call, tracker))
            except Exception as error:
                failed[name] = error
        deadline = max(self._wait_until, time.monotonic() + _MIN_WAIT_S)
        for name, tracker in list(self.trackers.items()):
            try:
                if tracker.is_waited_for and not self._queues[name].wait(max(0.0, deadline - time.monotonic())):
                    self._warn_of_delay(name)
            except Exception as error:
                failed[name] = error
            # Counted by method: where `log_scalars` has nothing to do, its success says nothing about `log_samples`.
            count_key = (name, method)
            self._num_failures[count_key] = self._num_failures[count_key] + 1 if name in failed else 0
            if name in failed:
                self._warn_once(name, failed[name])
                if self._num_failures[count_key] >= _MAX_FAILURES and not tracker.is_kept:
                    self._give_up(name)

    def _warn_of_delay(self, name: str) -> None:
        if name not in self._late:
            self._late.add(name)
            logger.warning("%s: a round takes longer than %g s to record; training does not wait", name, _MAX_WAIT_S)

    def _warn_once(self, name: str, error: Exception) -> None:
        kind = (name, type(error), getattr(error, "errno", None))  # a full disk is not a broken one
        level = logging.DEBUG if kind in self._warned else logging.WARNING
        self._warned.add(kind)
        logger.log(level, "%s: a round was not recorded: %s", name, describe(error))

    def _give_up(self, name: str) -> None:
        del self.trackers[name]
        logger.warning(
            "%s: disabled after %d failures in a row; the samples are in the JSONL files", name, _MAX_FAILURES
        )
