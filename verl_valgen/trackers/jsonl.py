"""Samples as JSON lines, whole: the source of truth, from which every other destination could be filled again.

This module owns what is written to the folder of step files, the description of the runs that wrote them, and how the
files of an earlier run are put out of the way.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from verl_valgen.records import Round
from verl_valgen.trackers.base import Tracker
from verl_valgen.trackers.first_file import Types, missing_types, types_in, with_types
from verl_valgen.viewing.folder import (
    BEST_FILE,
    NUMBERS_FILE,
    NUMBERS_FORMAT,
    RUNS_FILE,
    STEP_FILE,
    numbers_file,
    step_file,
)
from verl_valgen.viewing.page_files import PAGE_FILES, TEMPORARY_FILES, drop_data
from verl_valgen.viewing.whole_files import TEMPORARY_SUFFIX, replace_file

_FILES_OF_A_RUN = (RUNS_FILE, BEST_FILE)
"""Files that describe a run as a whole, beside its step files."""


class JsonlTracker(Tracker):
    """Writes `<directory>/step_<N, 8 digits>.jsonl`, one record per line, and beside it the round's numbers,
    `step_<N>.numbers.json`; a step that is repeated replaces its files.

    Args:
        run: What describes the run (date, name, configuration): one more entry of `runs.json`, behind the first round.
    """

    is_kept = True
    takes_unverified = True

    def __init__(self, directory: str | os.PathLike[str], run: Mapping[str, Any] | None = None) -> None:
        self._directory = Path(directory)
        self._run = run
        self._first: Path | None = None
        """The folder's first step file, once it is known."""
        self._types: Types = {}
        """What it has types for."""

    def log(self, round: Round) -> None:
        records = [sample.to_dict() for sample in round.samples]
        self._directory.mkdir(parents=True, exist_ok=True)
        path = step_file(self._directory, round.step)
        _replace(path, _lines(records))
        if self._run is not None:
            run, self._run = dict(self._run), None
            runs = self._directory / RUNS_FILE
            _replace(runs, _to_json([*_earlier_runs(runs), run], indent=2) + "\n")
        self._keep_loadable(path, records)
        numbers = {"format": NUMBERS_FORMAT, "step": round.step, "numbers": round.numbers.flat()}
        _replace(numbers_file(self._directory, round.step), _to_json(numbers) + "\n")

    def _keep_loadable(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        """Makes room in the folder's first step file for the types of the records that were written to `path`."""
        if self._first is None or not self._first.exists() or _step(path) <= _step(self._first):
            self._first = min((file for file in self._directory.iterdir() if STEP_FILE.fullmatch(file.name)), key=_step)
            self._types = types_in(records if self._first == path else _read(self._first))
        if missing := missing_types(self._types, types_in(records)):
            first = _read(self._first)
            content = _lines(with_types(first, missing))
            if content != _lines(first):
                _replace(self._first, content)
            for name, types in missing.items():  # with what found no room it is not tried again
                self._types.setdefault(name, set()).update(types)


def run_before(directory: str | os.PathLike[str], start_step: int) -> Mapping[str, Any] | None:
    """What `runs.json` says of the run that left the samples up to `start_step`; None where it says nothing."""
    for run in reversed(_earlier_runs(Path(directory) / RUNS_FILE)):
        started = run.get("start_step") if isinstance(run, dict) else None
        if isinstance(started, int) and started < start_step:
            return run
    return None


def set_aside(directory: str | os.PathLike[str], start_step: int, *, best_too: bool = False) -> Path | None:
    """Moves the step files beyond `start_step`, which an earlier run left, and their numbers to `<directory>/old-<k>/`.

    For a new run, which starts at 0, these are all, and what describes the earlier run (`runs.json`, `best.json`) and
    its page go with them; for a resumed run, which continues these, copies of the two do, and the page loses what is
    beyond. k is the smallest number from 1 that is free. Temporary files that a crash left are removed. Returns the new
    folder, or None if nothing had to be moved.

    Args:
        best_too: Whether a resumed run begins `best.json` anew: then it is copied in any case, and stays until the run
            replaces it, as the run may be a mistake that is stopped before.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return None
    for pattern in (f"*.json*{TEMPORARY_SUFFIX}", *TEMPORARY_FILES):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)
    stale = [path for path in sorted(directory.iterdir()) if _is_beyond(path, start_step)]
    about_runs = [path for name in _FILES_OF_A_RUN if (path := directory / name).exists()]
    if start_step == 0:
        stale += [*about_runs, *(path for name in PAGE_FILES if (path := directory / name).exists())]
    else:
        drop_data(directory, lambda step: step > start_step)
    is_replaced = best_too and directory / BEST_FILE in about_runs
    if not (stale or is_replaced):
        return None
    folder = next(path for k in count(1) if not (path := directory / f"old-{k}").exists())
    folder.mkdir()
    for path in stale:
        path.rename(folder / path.name)
    if start_step > 0:
        for path in set(about_runs).difference(stale):
            shutil.copyfile(path, folder / path.name)
    return folder


def _is_beyond(path: Path, start_step: int) -> bool:
    """Whether a file is of a step that a run from `start_step` on makes anew."""
    match = STEP_FILE.fullmatch(path.name) or NUMBERS_FILE.fullmatch(path.name)
    return match is not None and (start_step == 0 or int(match[1]) > start_step)


def _step(path: Path) -> int:
    match = STEP_FILE.fullmatch(path.name)
    assert match is not None, "it is a step file"
    return int(match[1])


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of a step file; [] where somebody has put something else there."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError:
        return []
    return records if all(isinstance(record, dict) for record in records) else []


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{_to_json(record)}\n" for record in records)


def _earlier_runs(path: Path) -> list[Any]:
    try:
        runs = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    return runs if isinstance(runs, list) else []


def _replace(path: Path, content: str) -> None:
    # Only a lone surrogate cannot be encoded, and its replacement `\ud800` is JSON's own escape for it.
    replace_file(path, content.encode("utf-8", errors="backslashreplace"))


def _to_json(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(_without_non_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _without_non_finite(value: Any) -> Any:
    """`value` with NaN and the infinities replaced by None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
