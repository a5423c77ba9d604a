"""Samples in SwanLab, in the run that verl opened.

SwanLab does not raise: what it refuses (str, None, a step that is not an int) it drops with a printed line. So only
what it takes is handed over: `Text`, an ECharts table, float.
"""

from __future__ import annotations

import sys

from verl_valgen.records import Round
from verl_valgen.trackers.base import TrackedRun, Tracker, package_of
from verl_valgen.trackers.table import TABLE_KEY, Cell, build_table, sample_texts, scalars


class SwanlabTracker(Tracker):
    """Logs a `Text` per sample and one table per step."""

    def __init__(self, run: TrackedRun) -> None:
        """Takes hold of the live run. Raises ImportError without the package, RuntimeError without a run."""
        swanlab = package_of("swanlab")
        if not self.is_live(run):
            raise RuntimeError("swanlab has no live run")
        self._run = swanlab.get_run()
        self._new_text = swanlab.Text
        self._new_table = swanlab.echarts.Table
        self._max_chars = run.settings.max_tracker_chars
        self._first_strategy = run.first_strategy

    @classmethod
    def is_live(cls, run: TrackedRun) -> bool:
        """Whether somebody opened a run in this process; does not import the package."""
        swanlab = sys.modules.get("swanlab")
        if swanlab is None:
            return False
        # `has_run` came after 0.7, where `get_run` answered None; now `get_run` raises without a run.
        return swanlab.has_run() if hasattr(swanlab, "has_run") else swanlab.get_run() is not None

    def log(self, round: Round) -> None:
        try:
            self._log_samples(round)
        finally:  # the numbers do not depend on the table
            self._run.log(scalars(round.numbers), step=int(round.step))

    def _log_samples(self, round: Round) -> None:
        columns, rows = build_table(round.samples, self._max_chars)
        table = self._new_table().add(columns, [list(map(_chartable, row)) for row in rows])
        texts = {
            key: self._new_text(text)
            for key, text in sample_texts(round.samples, self._max_chars, self._first_strategy).items()
        }
        # All in one call: a second value for the same key and step is ignored.
        self._run.log({**texts, TABLE_KEY: table}, step=int(round.step))


# pyecharts removes this mark, and a quotation mark beside it, from the finished JSON, which it then breaks.
_PYECHARTS_MARK = "--x_x--0_0--"


def _chartable(cell: Cell) -> Cell:
    return cell.replace(_PYECHARTS_MARK, "--x_x-- 0_0--") if isinstance(cell, str) else cell
