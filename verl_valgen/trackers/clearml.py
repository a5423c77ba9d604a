"""Samples in ClearML, in the task that verl opened.

ClearML queues what it is given for a process of its own, so that a dead host holds nobody up.
"""

from __future__ import annotations

from verl_valgen.records import Round
from verl_valgen.trackers.base import TrackedRun, Tracker, package_of
from verl_valgen.trackers.table import TABLE_KEY, Cell, build_table, scalars

_ALL = "(all)"
"""The line of the numbers of a whole round."""


class ClearmlTracker(Tracker):
    """Reports one table per step, and numbers: a graph for each, with a line for each strategy and data source."""

    def __init__(self, run: TrackedRun) -> None:
        """Takes hold of verl's task. Raises ImportError without the package, RuntimeError without a task."""
        package_of("clearml")
        if not self.is_live(run):
            raise RuntimeError("verl has no clearml task")
        self._logger = run.verl_loggers["clearml"]._get_logger()
        self._max_chars = run.settings.max_tracker_chars

    @classmethod
    def is_live(cls, run: TrackedRun) -> bool:
        """Whether verl opened a task; does not import the package."""
        return hasattr(run.verl_loggers.get("clearml"), "_get_logger")

    def log(self, round: Round) -> None:
        try:
            self._log_samples(round)
        finally:  # the numbers do not depend on the table
            for key, value in scalars(round.numbers).items():
                # verl's logger has one graph for all keys that begin alike: seconds would flatten the scores.
                title, series = _graph(key)
                self._logger.report_scalar(title, series, value, iteration=int(round.step))

    def _log_samples(self, round: Round) -> None:
        columns, rows = build_table(round.samples, self._max_chars)
        if rows:
            title, series = TABLE_KEY.split("/", 1)  # as verl's logger has it
            # Lists, no DataFrame: that turns None into "nan".
            table = [[_shown(column) for column in columns], *([_shown(cell) for cell in row] for row in rows)]
            self._logger.report_table(title, series, iteration=int(round.step), table_plot=table)


def _graph(key: str) -> tuple[str, str]:
    """Title and line of `val/gen/greedy/exact_match`: `val/gen/exact_match`, `greedy`."""
    group, number = key.rsplit("/", 1)
    first, second, *line = group.split("/")
    return f"{first}/{second}/{number}", "/".join(line) or _ALL


# Plotly, which shows the table, reads these as entities, tags, formulas and spaces.
_MARKS = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "\n": "<br>"}


def _shown(cell: Cell) -> Cell:
    if isinstance(cell, str):
        for mark, spelling in _MARKS.items():  # "&" first; far faster than `translate`
            cell = cell.replace(mark, spelling)
    return cell
