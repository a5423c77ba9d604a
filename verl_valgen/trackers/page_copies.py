"""The page of the whole run for trackers that take it, at the end of the run.

A long run takes longer to become one file than `composite.py` waits at the end. So this has a limit of its own, and
what does not come within it is told, with the command that makes the page.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from verl_valgen.text import as_exception, describe, printable
from verl_valgen.trackers.background import BackgroundQueue
from verl_valgen.trackers.base import Tracker

logger = logging.getLogger(__name__)

_MAX_S = 60.0
"""Time until all trackers have the page."""
_MAX_PENDING_S = 5.0
"""Time of it for the rounds that are under way."""


class PageCopies:
    """Makes the page, and hands it out.

    Args:
        directory: The folder of the samples.
        make: The page as text, from the files of a folder.
    """

    def __init__(self, directory: Path, make: Callable[[Path], str]) -> None:
        self._directory, self._make = directory, make

    def hand_out(self, trackers: Mapping[str, Tracker], submit: Callable[[str, Callable[[], object]], object]) -> None:
        """Gives the page to each tracker that takes it, on the tracker's thread. What fails is a warning.

        Args:
            submit: Queues a job on the thread of the tracker of a name.
        """
        takers = {name: tracker for name, tracker in trackers.items() if tracker.takes_page}
        if not takers:
            return
        logger.info("making the page for %s, for at most %g s", " and ".join(takers), _MAX_S)
        start = time.monotonic()
        writers = [name for name, tracker in trackers.items() if tracker.is_kept and tracker.is_waited_for]
        pending = {name: _Call(lambda: None) for name in (*writers, *takers)}
        for name, call in pending.items():
            submit(name, call)
        for call in pending.values():  # of the writers, so that the page has the last round
            call.wait(start + _MAX_PENDING_S)
        making = _Call(partial(self._make, self._directory))
        BackgroundQueue("page", 1).submit(making)
        problems: dict[str, str | None] = dict.fromkeys(takers, making.wait(start + _MAX_S))
        calls = {}
        for name, tracker in takers.items():
            problems[name] = problems[name] or pending[name].wait(0.0)
            if problems[name] is None:
                calls[name] = _Call(partial(tracker.add_page, making.value))
                submit(name, calls[name])
        for name, call in calls.items():
            problems[name] = call.wait(start + _MAX_S)
        for name, problem in problems.items():
            if problem is not None:
                self._warn(name, problem)

    def _warn(self, name: str, reason: str) -> None:
        directory = printable(shlex.quote(str(self._directory)), 300)
        logger.warning(
            "%s: the page of the run is not there: %s; python -m verl_valgen page %s --one-file page.html makes it",
            name, reason, directory,
        )  # fmt: skip


class _Call:
    """A job whose end can be waited for, and which raises nothing."""

    value: Any = None

    def __init__(self, job: Callable[[], object]) -> None:
        self._job = job
        self._ended = threading.Event()
        self._error: Exception | None = None

    def __call__(self) -> None:
        try:
            self.value = self._job()
        except BaseException as error:  # not handled here but handed over: `wait` tells it
            self._error = as_exception(error)
        finally:
            self._ended.set()

    def wait(self, deadline: float) -> str | None:
        """Waits until `deadline` (`time.monotonic()`) at most. Returns what went wrong, None: nothing did."""
        if not self._ended.wait(max(0.0, deadline - time.monotonic())):
            return "it takes too long"
        return None if self._error is None else describe(self._error)
