"""Samples in Weights & Biases, in the run that verl opened.

A round is logged in the row of its step, where verl logs its validation loss right afterwards. WandB takes nothing for
a row that it has closed, so a round that comes late goes into the row that is open. One to a row, as of two in one the
last alone would be left. `val/samples_step` says of each row which step the round in it is of.
"""

from __future__ import annotations

import io
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

from verl_valgen.records import Round
from verl_valgen.trackers.base import TrackedRun, Tracker, package_of
from verl_valgen.trackers.over_steps import TableOverSteps
from verl_valgen.trackers.table import TABLE_KEY, build_table, sample_texts, scalars

STEP_KEY = "val/samples_step"
"""The step of the round whose samples and numbers a row has; WandB draws the numbers over it."""

_OVER_STEPS_KEY = "val/samples_over_steps"
_PAGE_KEY = "val/samples_page"


@dataclass(frozen=True)
class _Entry:
    """What is logged of one round."""

    step: int
    samples: dict[str, Any]
    numbers: dict[str, Any]

    def keys(self) -> set[str]:
        return {*self.samples, *self.numbers}


class WandbTracker(Tracker):
    """Logs plain strings per sample, a table per step under one key, and another that grows over the steps."""

    takes_page = True

    name = "wandb"
    """verl's name for the logger."""

    def __init__(self, run: TrackedRun) -> None:
        """Takes hold of the live run. Raises ImportError without the package, RuntimeError without a run."""
        wandb = self._import()
        if wandb.run is None:
            raise RuntimeError(f"{self.name} has no live run")
        self._run = wandb.run
        self._new_table: Any = wandb.Table
        self._new_html: Any = wandb.Html
        self._max_chars = run.settings.max_tracker_chars
        self._first_strategy = run.first_strategy
        self._over_steps = TableOverSteps(wandb.Table, self._max_chars, self._first_strategy)
        self._late: deque[_Entry] = deque()
        """Rounds that wait for a row of their own. Few, as verl opens a row at every training step, unless somebody has
        put WandB's counter far ahead; all are logged at the end."""
        self._row = -1
        """The last row that has a round, and that round."""
        self._in_row: _Entry | None = None
        self._run.define_metric("val/gen/*", step_metric=STEP_KEY)

    @classmethod
    def is_live(cls, run: TrackedRun) -> bool:
        """Whether somebody opened a run in this process; does not import the package."""
        return getattr(cls._imported(), "run", None) is not None

    @classmethod
    def _imported(cls) -> Any:
        """The module that verl logs through, if it is imported."""
        return sys.modules.get("wandb")

    @classmethod
    def _import(cls) -> Any:
        """Imports the module that verl logs through. Raises ImportError without its package."""
        return package_of("wandb")

    def log(self, round: Round) -> None:
        entry = self._entry(round)
        if round.step >= self._run.step:
            self._log_in_time(entry)
        else:
            self._late.append(entry)
            self._log_late()
        table = self._over_steps.add(round.samples)
        if table is not None:  # a row keeps the last of several increments, which names those before it
            self._run.log({_OVER_STEPS_KEY: table}, commit=False)

    def add_page(self, page: str) -> None:
        """The whole page: `inject` would have it fetch a style sheet, and a `str` might be taken for a path."""
        self._run.log({_PAGE_KEY: self._new_html(io.StringIO(page), inject=False)}, commit=False)

    def close(self) -> None:
        """Gives each round that still waits a row of its own, behind verl's last: verl logs nothing more."""
        while self._late:
            if self._row == self._run.step:
                self._run.log({}, commit=True)
            self._log_late()

    def _entry(self, round: Round) -> _Entry:
        columns, rows = build_table(round.samples, self._max_chars)
        # A fresh table per step: a table that grows is uploaded whole each time, and one that was logged before stores
        # only the rows it had then.
        table = self._new_table(columns=columns, data=rows)
        samples = {
            **sample_texts(round.samples, self._max_chars, self._first_strategy),
            TABLE_KEY: table,
            STEP_KEY: round.step,
        }
        return _Entry(round.step, samples, {**scalars(round.numbers), STEP_KEY: round.step})

    def _log_in_time(self, entry: _Entry) -> None:
        displaced = self._in_row if self._row == entry.step else None
        if displaced is not None:
            if displaced.step != entry.step:  # a late one that took this round's row; else this round is repeated
                self._late.appendleft(displaced)
            left_over = displaced.keys() - entry.keys()
            self._run.log(dict.fromkeys(left_over), step=entry.step)
        self._log(entry, step=entry.step)
        if self._run.step > entry.step:  # verl closed the row meanwhile: it may have been too late
            self._late.append(entry)
            self._log_late()
        else:
            self._row, self._in_row = entry.step, entry

    def _log_late(self) -> None:
        """Logs the first round that waits into the open row, unless that has a round.

        `commit=False` leaves the row open: a `log` with neither step nor commit would close it, and verl's later log
        at that step would be lost.
        """
        if self._late and self._row != self._run.step:
            entry = self._late.popleft()
            self._log(entry, commit=False)
            self._row, self._in_row = self._run.step, entry

    def _log(self, entry: _Entry, **where: Any) -> None:
        try:
            self._run.log(entry.samples, **where)
        finally:  # the numbers do not depend on the table
            self._run.log(entry.numbers, **where)
