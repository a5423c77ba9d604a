"""The best value that a metric had over the rounds, and where: `<directory>/best.json`.

The file holds the values that were the best before, too: a run that is resumed at an earlier step goes on from those.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from verl_valgen.files import replace_file
from verl_valgen.text import printable

logger = logging.getLogger(__name__)


class Record(NamedTuple):
    """A value and the step of its round."""

    value: float
    step: int


class Best:
    """
    Args:
        directory: Of the samples.
        metric: A key of `aggregates.round_scalars`.
        mode: max or min.
        start_step: What the file says of later steps belongs to an earlier run, as all does for a new one.
    """

    def __init__(self, directory: Path, metric: str, mode: str, start_step: int) -> None:
        self.path = directory / "best.json"
        self.metric, self.mode = metric, mode
        self.records = [record for record in self._read() if 0 < start_step >= record.step]
        """Each was the best when it came; the last is."""
        self._is_unknown = False
        self._is_written = True

    def update(self, scalars: Mapping[str, float], step: int) -> dict[str, float]:
        """Takes a round's numbers; the best so far, as numbers of that round: `best` and `best_step`.

        Raises:
            OSError: The file could not be written; the value is kept, and written with the next round.
        """
        value = scalars.get(self.metric)
        if value is None:
            if not self._is_unknown:
                self._is_unknown = True
                known = printable(", ".join(scalars), 300)
                logger.warning("generation.best_metric: this round has no %s; there are %s", self.metric, known)
        elif math.isfinite(value) and self._is_best(value):
            self.records.append(Record(value, step))
            self._is_written = False
        if not self.records:
            return {}
        if not self._is_written:
            self._write()
            self._is_written = True
        best = self.records[-1]
        return {"best": best.value, "best_step": float(best.step)}

    def _is_best(self, value: float) -> bool:
        if not self.records:
            return True
        best = self.records[-1].value
        return value > best if self.mode == "max" else value < best

    def _write(self) -> None:
        *before, best = [record._asdict() for record in self.records]
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
