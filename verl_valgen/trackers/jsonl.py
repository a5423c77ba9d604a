"""Samples as JSON lines, whole: the source of truth, from which every other destination could be filled again.

This module owns the folder of step files: their names, and how those of an earlier run are put out of the way.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from verl_valgen.records import Sample
from verl_valgen.trackers.base import Tracker
from verl_valgen.whole_files import TEMPORARY_SUFFIX, replace_file

_STEP_FILE = re.compile(r"step_(\d{8,})\.jsonl")


class JsonlTracker(Tracker):
    """Writes `<directory>/step_<N, 8 digits>.jsonl`, one record per line; a step that is repeated replaces its file."""

    is_kept = True

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        content = "".join(f"{_to_json(sample)}\n" for sample in samples)
        self._directory.mkdir(parents=True, exist_ok=True)
        # Only a lone surrogate cannot be encoded, and its replacement `\ud800` is JSON's own escape for it.
        replace_file(self._directory / f"step_{step:08d}.jsonl", content.encode("utf-8", errors="backslashreplace"))

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Nothing: the scores stand in the records."""


def set_aside(directory: str | os.PathLike[str], start_step: int) -> Path | None:
    """Moves the step files beyond `start_step`, which an earlier run left, to `<directory>/old-<k>/`.

    For a new run, which starts at 0, these are all. k is the smallest number from 1 that is free. Temporary files that
    a crash left are removed. Returns the new folder, or None if nothing had to be moved.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return None
    for path in directory.glob(f"*.json*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
    matches = [(path, _STEP_FILE.fullmatch(path.name)) for path in sorted(directory.iterdir())]
    stale = [path for path, match in matches if match and (int(match[1]) > start_step or start_step == 0)]
    if not stale:
        return None
    folder = next(path for k in count(1) if not (path := directory / f"old-{k}").exists())
    folder.mkdir()
    for path in stale:
        path.rename(folder / path.name)
    return folder


def _to_json(sample: Sample) -> str:
    return json.dumps(_without_non_finite(sample.to_dict()), ensure_ascii=False, allow_nan=False)


def _without_non_finite(value: Any) -> Any:
    """`value` with NaN and the infinities replaced by None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
