"""All destinations as one, and the error policy of this layer.

A tracker that fails costs a warning, never a training step: this is the one place that catches what an open tracker
raises. There is one warning per tracker and kind of error. A tracker that fails three times in a row is given up,
except those that write files (`Tracker.is_kept`).

Any tracker may hang, a folder on a dead disk too. So each has a thread of its own, and the trainer waits a moment for
it; a call that takes longer goes on behind the trainer, and its error is reported with a later call. The threads are
daemons: the process ends without them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from verl_valgen.records import Round
from verl_valgen.text import OnceLogger, describe
from verl_valgen.trackers.background import BackgroundQueue
from verl_valgen.trackers.base import Tracker

if TYPE_CHECKING:
    from verl_valgen.trackers.page_copies import PageCopies

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3

_MAX_PENDING_CALLS = 32
"""Calls that wait for one tracker, at most; a further one drops the oldest."""

_MAX_WAIT_S = 0.8
"""Time that a round waits for all trackers together."""
_MAX_CLOSE_S = 5.0
"""Time that `close` waits for all trackers together. The process takes some seconds more to end."""


class CompositeTracker(Tracker):
    """Hands every round on to each tracker. Raises nothing but what ends the program, such as Ctrl-C.

    Args:
        page: Hands the page of the whole run out, at the end; None: no tracker gets it.
    """

    def __init__(self, trackers: Mapping[str, Tracker], page: PageCopies | None = None) -> None:
        self.trackers = dict(trackers)
        """The trackers still in use, by name."""
        self._page = page
        self._queues = {name: BackgroundQueue(name, _MAX_PENDING_CALLS) for name in trackers}
        self._num_failures: Counter[str] = Counter()
        self._log = OnceLogger(logger)

    def log(self, round: Round) -> None:
        failed: dict[str, Exception] = {}
        shown = round.shown()
        # What is not waited for is begun last: it would take time from what is.
        waited_for = [name for name, tracker in self.trackers.items() if tracker.is_waited_for]
        self._begin(waited_for, round, shown, failed)
        self._wait(waited_for, failed)
        self._begin([name for name in self.trackers if name not in waited_for], round, shown, failed)
        for name, tracker in list(self.trackers.items()):
            self._num_failures[name] = self._num_failures[name] + 1 if name in failed else 0
            if name in failed:
                self._warn_of_error(name, failed[name])
                if self._num_failures[name] >= _MAX_FAILURES and not tracker.is_kept:
                    self._give_up(name)

    def _begin(self, names: Iterable[str], round: Round, shown: Round, failed: dict[str, Exception]) -> None:
        for name in names:
            tracker = self.trackers[name]
            try:
                self._queues[name].submit(partial(tracker.log, round if tracker.takes_unverified else shown))
            except Exception as error:
                failed[name] = error

    def _wait(self, names: Iterable[str], failed: dict[str, Exception]) -> None:
        deadline = time.monotonic() + _MAX_WAIT_S
        for name in names:
            try:
                if not self._queues[name].wait(max(0.0, deadline - time.monotonic())):
                    self._warn_of_delay(name)
            except Exception as error:
                failed[name] = error

    def close(self) -> None:
        """Waits for the calls that are under way, at most `_MAX_CLOSE_S` in all, beside what the page may take."""
        if self._page is not None:
            self._page.hand_out(self.trackers, self._submit)
        deadline = time.monotonic() + _MAX_CLOSE_S
        for name, tracker in self.trackers.items():
            self._submit(name, tracker.close)
        for name in self.trackers:
            with self._errors_as_warnings(name):
                self._queues[name].drain(max(0.0, deadline - time.monotonic()))

    def _submit(self, name: str, job: Callable[[], object]) -> None:
        with self._errors_as_warnings(name):
            self._queues[name].submit(job)

    @contextmanager
    def _errors_as_warnings(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._warn_of_error(name, error)

    def _warn_of_delay(self, name: str) -> None:
        message = f"{name}: a round takes longer than {_MAX_WAIT_S:g} s to record; training does not wait"
        self._log.warn(message, cause=(name, "late"))

    def _warn_of_error(self, name: str, error: Exception) -> None:
        kind = (name, type(error), getattr(error, "errno", None))  # a full disk is not a broken one
        self._log.warn(f"{name}: a round was not recorded: {describe(error)}", cause=kind)

    def _give_up(self, name: str) -> None:
        del self.trackers[name]
        logger.warning(
            "%s: disabled after %d failures in a row; the samples are in the JSONL files", name, _MAX_FAILURES
        )
