"""A bar on the terminal while answers are long in coming: how many are done, and since when.

Drawn by a thread of its own, which does nothing else. Answers come by the batch, and a batch may take minutes, in which
nobody else could draw; to be told of every token would cost the loops more than that thread, which sleeps. The
trainer's thread adds up numbers and waits for nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from verl_valgen.viewing.beside_bars import is_terminal

_SHOWN_AFTER_S = 2.0
_REDRAWN_EVERY_S = 0.5
_MAX_WAIT_S = 1.0
"""A terminal that is held up (Ctrl-S) takes no bar away: then the round goes on without."""


class AnswersBar:
    """Shows how many answers are done, from two seconds after a round's beginning on; taken away at the end of `with`.

    Args:
        num_answers: How many this rank gives.
        num_in_all: How many all ranks give.
        since: `time.monotonic()` of the round's beginning.
        is_wanted: Whether there is to be a bar, if standard error is a terminal: there verl's is.
    """

    def __init__(self, num_answers: int, num_in_all: int, since: float, *, is_wanted: bool) -> None:
        self.num_answers, self.num_in_all, self.since = num_answers, num_in_all, since
        self.num_done = 0
        self._stopped = threading.Event()
        self._stream = sys.stderr
        self._thread: threading.Thread | None = None
        if is_wanted and is_terminal(self._stream):
            self._thread = threading.Thread(target=self._draw, name="verl-valgen-bar", daemon=True)

    def __enter__(self) -> AnswersBar:
        if self._thread is not None:
            try:
                self._thread.start()
            except RuntimeError:  # no more threads: without a bar, as other ranks wait for this one's answers
                self._thread = None
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_MAX_WAIT_S)

    def add(self, num_answers: int) -> None:
        """Counts answers that have come to an end."""
        self.num_done += num_answers

    def _draw(self) -> None:
        try:
            if not self._stopped.wait(max(0.0, self.since + _SHOWN_AFTER_S - time.monotonic())):
                self._draw_until_stopped()
        except Exception:  # a terminal that has gone: a bar is a nicety
            return

    def _draw_until_stopped(self) -> None:
        from tqdm import tqdm  # verl's own dependency, and its class: only that one makes room beside verl's bar

        of = "" if self.num_answers == self.num_in_all else f" of this rank, {self.num_in_all} in all"
        form = f"Generating: {{n_fmt}}/{{total_fmt}} answers{of} [{{elapsed}}] {{bar:20}}"
        shown: dict[str, Any] = {"total": self.num_answers, "initial": self.num_done, "bar_format": form}
        # Where it cannot draw, tqdm's `refresh` keeps the lock of all bars, and the trainer would wait for it for ever.
        # So it must not take the lock, nor be called when the bar is made, as it would be without a delay.
        with tqdm(**shown, leave=False, dynamic_ncols=True, file=self._stream, delay=1) as bar:
            bar.delay = 0
            bar.start_t -= time.monotonic() - self.since  # the time since the round began
            while True:
                with tqdm.get_lock():
                    bar.n = self.num_done
                    bar.refresh(nolock=True)
                if self._stopped.wait(_REDRAWN_EVERY_S):
                    return
