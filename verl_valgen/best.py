"""The best value that a metric had over the rounds, and where: `<directory>/best.json`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_valgen.files import replace_file
from verl_valgen.text import printable

logger = logging.getLogger(__name__)


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
        self.value: float | None = None
        self.step = 0
        self._is_unknown = False
        self._is_written = True
        before = self._read()
        if before is not None and 0 < start_step >= before["step"]:
            self.value, self.step = before["value"], before["step"]

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
        elif math.isfinite(value) and (self.value is None or self._is_better(value)):
            self.value, self.step, self._is_written = value, step, False
        if self.value is not None and not self._is_written:
            record = {"metric": self.metric, "mode": self.mode, "value": self.value, "step": self.step}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, (json.dumps(record) + "\n").encode("ascii"))
            self._is_written = True
        return {} if self.value is None else {"best": self.value, "best_step": float(self.step)}

    def _is_better(self, value: float) -> bool:
        assert self.value is not None
        return value > self.value if self.mode == "max" else value < self.value

    def _read(self) -> dict[str, Any] | None:
        """What an earlier run of the same metric has left."""
        try:
            record = json.loads(self.path.read_bytes())
            is_ours = (record["metric"], record["mode"]) == (self.metric, self.mode)
            return {"value": float(record["value"]), "step": int(record["step"])} if is_ours else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
