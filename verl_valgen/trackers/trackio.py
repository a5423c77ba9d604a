"""Samples in Trackio, in the run that verl opened.

As traces where the version has them: its dashboard shows those step by step, whole, and searches in them. Older ones
have tables alone, which it shows one below the other with cells cut at 250 characters. Texts under keys of their own
are shown nowhere, so there are none.

Trackio queues what it is given, and writes it on a thread of its own. There a value that is no JSON costs an older
version all that is queued, verl's numbers too: only plain Python values and texts that can be stored are handed over.
"""

from __future__ import annotations

import sys
from typing import Any

from verl_valgen.records import Round
from verl_valgen.trackers.base import TrackedRun, Tracker, package_of
from verl_valgen.trackers.table import TABLE_KEY, Cell, build_table, scalars


class TrackioTracker(Tracker):
    """Logs a trace per sample, or one table per step; and numbers."""

    def __init__(self, run: TrackedRun) -> None:
        """Takes hold of this thread's live run. Raises ImportError without the package, RuntimeError without a run."""
        trackio = package_of("trackio")
        self._run = _live_run()
        if self._run is None:
            raise RuntimeError("trackio has no live run in this thread")
        self._new_trace: Any = getattr(trackio, "Trace", None)
        self._new_table: Any = trackio.Table
        self._max_chars = run.settings.max_tracker_chars

    @classmethod
    def is_live(cls, run: TrackedRun) -> bool:
        """Whether this thread opened a run; does not import the package."""
        return _live_run() is not None

    def log(self, round: Round) -> None:
        try:
            self._log_samples(round)
        finally:  # the numbers do not depend on the samples
            self._run.log(scalars(round.numbers), step=int(round.step))

    def _log_samples(self, round: Round) -> None:
        columns, rows = build_table(round.samples, self._max_chars)
        if not rows:
            return  # an empty table has no columns there
        if self._new_trace is not None:
            content = [self._trace(dict(zip(columns, row, strict=True))) for row in rows]
        else:
            import pandas as pd  # a dependency of those versions; their tables drop the columns' names otherwise

            # "object": a column of numbers with one missing would have NaN there, and NaN is no JSON.
            content = self._new_table(dataframe=pd.DataFrame(rows, columns=columns, dtype=object))
        self._run.log({TABLE_KEY: content}, step=int(round.step))

    def _trace(self, cells: dict[str, Cell]) -> Any:
        prompt, generation = cells.pop("prompt_text"), cells.pop("generation")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": generation}]
        return self._new_trace(messages, metadata=cells)


def _live_run() -> Any:
    # `trackio.log` looks for the run of its own thread, and on a tracker's thread there is none.
    context_vars = sys.modules.get("trackio.context_vars")
    return None if context_vars is None else context_vars.current_run.get()
