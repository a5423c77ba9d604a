"""Samples in Weights & Biases, in the run that verl opened.

Logged at the step that verl logs its validation loss at right afterwards.
"""

from __future__ import annotations

import sys
from typing import Any

from verl_valgen.records import Round
from verl_valgen.trackers.base import TrackedRun, Tracker
from verl_valgen.trackers.table import TABLE_KEY, build_table, sample_texts, scalars


class WandbTracker(Tracker):
    """Logs plain strings per sample, and one table per step under one key."""

    def __init__(self, run: TrackedRun) -> None:
        """Takes hold of the live run. Raises ImportError without the package, RuntimeError without a run."""
        try:
            import wandb
        except ImportError as error:
            raise ImportError("samples in wandb need the package: pip install verl-valgen[wandb]") from error
        if wandb.run is None:
            raise RuntimeError("wandb has no live run")
        self._run = wandb.run
        self._new_table: Any = wandb.Table
        self._max_chars = run.settings.max_tracker_chars

    @classmethod
    def is_live(cls, run: TrackedRun) -> bool:
        """Whether somebody opened a run in this process; does not import the package."""
        wandb = sys.modules.get("wandb")
        return getattr(wandb, "run", None) is not None

    def log(self, round: Round) -> None:
        try:
            self._log_samples(round)
        finally:  # the numbers do not depend on the table
            self._log(scalars(round.numbers), round.step)

    def _log_samples(self, round: Round) -> None:
        columns, rows = build_table(round.samples, self._max_chars)
        # A fresh table per step: a table that grows is uploaded whole each time, and one that was logged before stores
        # only the rows it had then.
        table = self._new_table(columns=columns, data=rows)
        self._log({**sample_texts(round.samples, self._max_chars), TABLE_KEY: table}, round.step)

    def _log(self, data: dict[str, Any], step: int) -> None:
        # wandb drops a step that lies behind, so such data joins the row that is open. `commit=False` leaves that row
        # open: a `log` with neither step nor commit would close it, and verl's later log at that step would be lost.
        if step >= self._run.step:
            self._run.log(data, step=step)
        else:
            self._run.log(data, commit=False)
