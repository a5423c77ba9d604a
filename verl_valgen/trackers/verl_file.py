"""Numbers in the lines of verl's `file` logger, between verl's own.

Through verl's own live object: it opened the file for itself, and a second handle's lines would be overwritten.
"""

from __future__ import annotations

import logging

from verl_valgen.records import Round
from verl_valgen.text import printable
from verl_valgen.trackers.base import TrackedRun, Tracker
from verl_valgen.trackers.table import scalars

logger = logging.getLogger(__name__)


class VerlFileTracker(Tracker):
    """Writes the numbers of a round as one line, `{"step": ..., "data": {...}}`. Samples have files of their own."""

    is_kept = True

    def __init__(self, run: TrackedRun) -> None:
        """Takes hold of verl's logger. Raises RuntimeError without one."""
        if not self.is_live(run):
            raise RuntimeError("verl has no file logger")
        self._logger = run.verl_loggers["file"]
        where = printable(str(getattr(self._logger, "filepath", "verl's file")), 200)
        logger.info("file: numbers go to %s; the samples are in the JSONL files", where)

    @classmethod
    def is_live(cls, run: TrackedRun) -> bool:
        """Whether verl opened its file."""
        return "file" in run.verl_loggers

    def log(self, round: Round) -> None:
        self._logger.log(data=scalars(round.numbers), step=int(round.step))
        self._logger.fp.flush()  # verl 0.6 keeps 8 KB otherwise, which a kill loses
