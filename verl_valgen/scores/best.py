"""The best value that a metric had over the rounds, and where: `<directory>/best.json`.

The file holds the values that were the best before, too: a run that is resumed at an earlier step goes on from those.
The value is known at once, the file is written behind the trainer, as a tracker.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from verl_valgen.records import Sample
from verl_valgen.text import printable
from verl_valgen.trackers.base import Tracker
from verl_valgen.whole_files import replace_file

logger = logging.getLogger(__name__)


class Record(NamedTuple):
    """A value and the step of its round."""

    value: float
    step: int


class Best(Tracker):
    """
    Args:
        directory: Of the samples.
        metric: A key of `aggregates.round_scalars`.
        mode: max or min.
        start_step: What the file says of later steps belongs to an earlier run, as all does for a new one.
    """

    is_kept = True

    def __init__(self, directory: Path, metric: str, mode: str, start_step: int) -> None:
        self.path = directory / "best.json"
        self.metric, self.mode = metric, mode
        self.records = [record for record in self._read() if 0 < start_step >= record.step]
        """Each was the best when it came; the last is."""
        self._written: list[Record] | None = None
        """What the file says; None is what an earlier run left, of steps that may be no more."""
        self._is_unknown = False

    def update(self, scalars: Mapping[str, float], step: int) -> dict[str, float]:
        """Takes a round's numbers; the best so far, as numbers of that round: `best` and `best_step`."""
        value = scalars.get(self.metric)
        if value is None:
            if not self._is_unknown:
                self._is_unknown = True
                known = printable(", ".join(scalars), 300)
                logger.warning("generation.best_metric: this round has no %s; there are %s", self.metric, known)
        elif math.isfinite(value) and self._is_best(value):
            self.records.append(Record(value, step))
        if not self.records:
            return {}
        best = self.records[-1]
        return {"best": best.value, "best_step": float(best.step)}

    def _is_best(self, value: float) -> bool:
        if not self.records:
            return True
        best = self.records[-1].value
        return value > best if self.mode == "max" else value < best

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Nothing: the value is among the numbers, which come after them."""

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Writes the file, unless it says all that `update` has been told."""
        records = list(self.records)  # to which the trainer's thread may add
        if records == self._written:
            return
        if records:
            self._write(records)
        else:
            self.path.unlink(missing_ok=True)
        self._written = records

    def _write(self, records: Sequence[Record]) -> None:
        *before, best = [record._asdict() for record in records]
        content = {"metric": self.metric, "mode": self.mode, **best, "before": before}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, (json.dumps(content) + "\n").encode("ascii"))

    def _read(self) -> list[Record]:
        """What an earlier run of the same metric has left."""
        try:
            content = json.loads(self.path.read_bytes())
            if (content["metric"], content["mode"]) != (self.metric, self.mode):
                return []
            return [Record(float(one["value"]), int(one["step"])) for one in (*content["before"], content)]
        except (OSError, ValueError, KeyError, TypeError):
            return []
