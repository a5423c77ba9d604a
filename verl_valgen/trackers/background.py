"""Work that may hang for minutes, kept off the trainer's thread.

This module owns the thread, the bound on what waits for it, and the way back of errors. It knows nothing of trackers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from verl_valgen.text import as_exception


class BackgroundQueue:
    """Runs jobs one after the other on a daemon thread: neither `submit` nor the end of the process waits for it."""

    def __init__(self, name: str, max_pending: int) -> None:
        self._name = name
        self._max_pending = max_pending
        self._pending: deque[Callable[[], object]] = deque()
        self._error: Exception | None = None
        self._is_busy = self._is_late = False
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()

    def submit(self, job: Callable[[], object]) -> None:
        """Queues `job`, in place of the oldest if `max_pending` wait. Raises the last error of the jobs before it."""
        with self._changed:
            error, self._error = self._error, None
            self._is_late = self._is_late and not self._is_done()
            if len(self._pending) == self._max_pending:
                self._pending.popleft()
                error = TimeoutError(f"{self._name} does not keep up: an earlier call was dropped")
            self._pending.append(job)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"verl-valgen-{self._name}", daemon=True)
                self._thread.start()
        if error is not None:
            raise error

    def wait(self, timeout_s: float) -> bool:
        """Waits until everything is done, at most `timeout_s`, and not at all behind a job that is late already.

        Returns:
            Whether it is done. Raises the last error since the last call.
        """
        with self._changed:
            self._is_late = not self._changed.wait_for(self._is_done, 0.0 if self._is_late else timeout_s)
        self._raise_error()
        return not self._is_late

    def _is_done(self) -> bool:
        return not self._pending and not self._is_busy

    def drain(self, timeout_s: float) -> None:
        """Waits until everything is done, at most `timeout_s`. Raises the last error since the last call."""
        with self._changed:
            if not self._changed.wait_for(self._is_done, timeout_s):
                num_lost = len(self._pending) + self._is_busy
                self._pending.clear()
                self._error = TimeoutError(f"{self._name} did not finish {num_lost} calls in time")
        self._raise_error()

    def _raise_error(self) -> None:
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._pending))
                job = self._pending.popleft()
                self._is_busy = True
            try:
                job()
            except BaseException as error:  # not handled here but handed over: the next call raises it
                with self._changed:
                    self._error = as_exception(error)  # what ends this thread must not end the trainer's
