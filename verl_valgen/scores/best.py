"""The best value that a metric had over the rounds, and where: `<directory>/best.json`.

The file also holds the earlier bests, so that a run that is resumed knows the best up to the step that it starts from.
The value is known at once; the file is written later, by whoever calls `write`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from verl_valgen.records import BestValue, RoundNumbers
from verl_valgen.text import OnceLogger, printable
from verl_valgen.viewing.whole_files import replace_file

FILE_NAME = "best.json"


class Best:
    """Keeps the best value of one number of the rounds.

    Args:
        directory: The folder of the samples.
        metric: A key of `RoundNumbers.all`: it need not be one that is logged.
        mode: max or min.
        start_step: The step that the run starts from. What the file says of later steps belongs to an earlier run, and
            for a new run, which starts at 0, all of it does.
        prompts: Tells the prompts of the run from others, of which a value says nothing; None: that is not known.
    """

    def __init__(self, directory: Path, metric: str, mode: str, start_step: int, prompts: str | None = None) -> None:
        self.path = directory / FILE_NAME
        self.metric, self.mode, self.prompts = metric, mode, prompts
        self.values = [best for best in self._read() if start_step > 0 and best.step <= start_step]
        """Each was the best when it came; the last one is."""
        self._written: list[BestValue] | None = None
        """The values in the file; None while it may hold an earlier run's, of steps that no longer exist."""
        self._log = OnceLogger(logging.getLogger(__name__))

    def update(self, numbers: RoundNumbers, step: int) -> RoundNumbers:
        """Takes a round's numbers in, and returns them with the best value so far."""
        value = numbers.all().get(self.metric)
        if value is None:
            known = printable(", ".join(numbers.flat()), 600)
            self._log.warn(f"generation.best_metric: this round has no {self.metric}; there are {known}", cause="")
        elif math.isfinite(value) and self._is_best(value):
            self.values.append(BestValue(value, step))
        return replace(numbers, best=self.values[-1] if self.values else None)

    def _is_best(self, value: float) -> bool:
        if not self.values:
            return True
        best = self.values[-1].value
        return value > best if self.mode == "max" else value < best

    def write(self) -> None:
        """Writes the file, unless it is up to date. May be called from another thread than `update`."""
        values = list(self.values)
        if values == self._written:
            return
        if values:
            self._write(values)
        else:
            self.path.unlink(missing_ok=True)
        self._written = values

    def _write(self, values: Sequence[BestValue]) -> None:
        *before, best = [value._asdict() for value in values]
        content = {"metric": self.metric, "mode": self.mode, **best, "before": before}
        if self.prompts is not None:
            content["prompts"] = self.prompts
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, (json.dumps(content) + "\n").encode("ascii"))

    def _read(self) -> list[BestValue]:
        """The earlier values of the same metric and prompts; [] where the file is missing or broken."""
        try:
            content = json.loads(self.path.read_bytes())
            if (content["metric"], content["mode"]) != (self.metric, self.mode):
                return []
            if self.prompts is not None and content.get("prompts", self.prompts) != self.prompts:
                return []
            return [BestValue(float(one["value"]), int(one["step"])) for one in (*content["before"], content)]
        except (OSError, ValueError, KeyError, TypeError):
            return []
