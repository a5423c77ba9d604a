"""All destinations as one, and the error policy of this layer.

A tracker that fails costs a warning, never a training step: this is the one place that catches what an open tracker
raises. There is one warning per tracker and kind of error. A tracker whose calls fail three times running is given up,
except for the JSONL files: they are the source of truth, and a disk that was full may have room again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from verl_valgen.samples import Sample
from verl_valgen.text import describe
from verl_valgen.trackers.base import Tracker

logger = logging.getLogger(__name__)

SOURCE_OF_TRUTH = "jsonl"

_MAX_FAILURES = 3


class CompositeTracker(Tracker):
    """Hands everything on to each tracker in turn. Raises nothing but what ends the program, such as Ctrl-C."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self.trackers = dict(trackers)
        """Those still in use, by name, in the order in which they are called."""
        self._num_failures: Counter[tuple[str, str]] = Counter()
        self._warned: set[tuple[str, type[Exception]]] = set()

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        self._call_each("log_samples", lambda tracker: tracker.log_samples(samples, step))

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        self._call_each("log_scalars", lambda tracker: tracker.log_scalars(scalars, step))

    def close(self) -> None:
        self._call_each("close", lambda tracker: tracker.close())

    def _call_each(self, method: str, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            # Counted by method: where `log_scalars` has nothing to do, its success says nothing about `log_samples`.
            count_key = (name, method)
            try:
                call(tracker)
            except Exception as error:
                self._num_failures[count_key] += 1
                self._warn_once(name, error)
                if self._num_failures[count_key] >= _MAX_FAILURES and name != SOURCE_OF_TRUTH:
                    self._give_up(name)
            else:
                self._num_failures[count_key] = 0

    def _warn_once(self, name: str, error: Exception) -> None:
        if (name, type(error)) not in self._warned:
            self._warned.add((name, type(error)))
            logger.warning("%s: samples were not recorded: %s", name, describe(error))

    def _give_up(self, name: str) -> None:
        del self.trackers[name]
        logger.warning(
            "%s: disabled after %d failures in a row; the samples are in the JSONL files", name, _MAX_FAILURES
        )
