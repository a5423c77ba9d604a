"""A folder of samples, as it lies on disk: how its files are called, and reading them, of older versions too.

Whatever a file holds, reading goes on: what is not a sample is left out, and told. Knows nothing of the page.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STEP_FILE = re.compile(r"step_(\d{8,})\.jsonl")
NUMBERS_FILE = re.compile(r"step_(\d{8,})\.numbers\.json")

RUNS_FILE = "runs.json"
"""A list of the runs that have written to the folder, in the order of their starts."""

BEST_FILE = "best.json"

NUMBERS_FORMAT = 1

Record = dict[str, Any]


class NoSamples(ValueError):
    """There are no samples where some were asked for."""


def step_file(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}.jsonl"


def numbers_file(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}.numbers.json"


def find_folder(path: Path) -> Path:
    """The folder of samples that is meant: `path`, or `generations` in it. Raises `NoSamples`, in one line."""
    for directory in (path, path / "generations"):
        if Folder(directory).steps():
            return directory
    raise NoSamples(f"no samples in {path}: there is no step_*.jsonl in it, nor in its generations/")


class Folder:
    """Reads a folder of samples.

    Args:
        tell: Is told, in a line each, what could not be read.
    """

    def __init__(self, directory: Path, tell: Callable[[str], object] = lambda problem: None) -> None:
        self.directory = directory
        self._tell = tell

    def steps(self) -> list[int]:
        """The steps that have a file, in ascending order; [] where there is no folder."""
        try:
            names = [path.name for path in self.directory.iterdir()]
        except OSError:
            return []
        steps = {int(match[1]) for name in names if (match := STEP_FILE.fullmatch(name))}
        return sorted(step for step in steps if step_file(self.directory, step).name in names)

    def records(self, step: int) -> list[Record]:
        """The samples of a step, as they were recorded; [] where the file cannot be read."""
        path = step_file(self.directory, step)
        try:
            # Bytes that are not UTF-8 cost a character, not the file.
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            self._tell(f"{path.name} cannot be read: {error.strerror}")
            return []
        records = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = _parsed(line)
            if _is_sample(record):
                records.append(record)
            else:
                self._tell(f"{path.name}, line {number}: left out, as it is not a sample")
        return records

    def numbers(self, step: int) -> dict[str, float] | None:
        """The numbers of a step's round as they were logged; None where they were not kept."""
        content = self._json(numbers_file(self.directory, step))
        numbers = content.get("numbers") if isinstance(content, dict) else None
        if not isinstance(numbers, dict):
            return None
        return {name: value for name, value in numbers.items() if is_number(value)}

    def run(self) -> Mapping[str, Any]:
        """What is said of the run that wrote last; {} where nothing is."""
        runs = self._json(self.directory / RUNS_FILE)
        return runs[-1] if isinstance(runs, list) and runs and isinstance(runs[-1], dict) else {}

    def best(self) -> Mapping[str, Any]:
        """The best value: `metric`, `mode`, `value`, `step`; {} where there is none."""
        best = self._json(self.directory / BEST_FILE)
        is_whole = isinstance(best, dict) and is_number(best.get("value")) and isinstance(best.get("step"), int)
        return best if is_whole else {}

    def _json(self, path: Path) -> Any:
        """What a file holds; None where there is none or it is broken."""
        try:
            content = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        parsed = _parsed(content)
        if parsed is None:
            self._tell(f"{path.name}: left out, as it is not JSON")
        return parsed


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and small enough for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_sample(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("generation"), str)
        and isinstance(record.get("index"), int)
        and not isinstance(record["index"], bool)
    )
