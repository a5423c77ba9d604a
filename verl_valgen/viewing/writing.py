"""Writing the page: the parts that a live run writes, and all of it from a folder as it lies there.

What is right already is left alone, as a run may be writing to the folder.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_valgen.viewing.data import FORMAT, Payload, index_payload, run_entry, step_payload
from verl_valgen.viewing.folder import Folder, step_file
from verl_valgen.viewing.numbers import numbers_of
from verl_valgen.viewing.page_files import (
    DATA_FOLDER,
    INDEX,
    PAGE_FILE,
    STEP,
    data_file,
    drop_data,
    steps_file,
    write_whole,
)
from verl_valgen.viewing.script import call, to_json

_MAX_DELAY_S = 5.0
"""How much later than its data a step file may be written: one round writes both, one after the other or at once."""


def write_step(directory: Path, payload: Payload) -> None:
    write_whole(data_file(directory, payload["step"]), call(STEP, payload))


def write_index(directory: Path, run: Payload) -> None:
    write_whole(steps_file(directory), call(INDEX, index_payload([run])))


def write_app(directory: Path) -> None:
    from verl_valgen.viewing.page import render  # a template engine

    write_whole(directory / PAGE_FILE, render().encode())


def step_of(folder: Folder, step: int, run: int = 0) -> Payload | None:
    """A step's payload as the files have it; None where its file has no samples."""
    records = folder.records(step)
    if not records:
        return None
    numbers = folder.numbers(step)
    return step_payload(step, records, numbers_of(records) if numbers is None else numbers, run)


def entry_of(folder: Folder, steps: Sequence[int]) -> Payload:
    """The index's entry of a run as the files have it."""
    run, best = folder.run(), folder.best()
    settings = run.get("generation")
    if not isinstance(settings, Mapping):  # a folder of an early version
        settings = {"best_metric": best.get("metric"), "best_mode": best.get("mode")}
    metric, mode = settings.get("best_metric"), settings.get("best_mode")
    value = (best["value"], best["step"]) if best.get("metric") == metric and best else None
    return run_entry(
        run_name(folder.directory, run),
        place(folder.directory),
        steps,
        metric if isinstance(metric, str) else None,
        "min" if mode == "min" else "max",
        value,
    )


def run_name(directory: Path, run: Mapping[str, Any]) -> str:
    """What a person calls a run: its experiment or, where that is not known, the folder that it writes to."""
    experiment = run.get("experiment")
    return experiment if isinstance(experiment, str) and experiment else place(directory)


def place(directory: Path) -> str:
    """Where a folder lies, without what is nobody's business when a page is mailed: `checkpoints/generations`."""
    parts = directory.resolve().parts
    return "/".join(parts[-3 if parts[-1].startswith("old-") else -2 :])


def make_page(folder: Folder) -> Path:
    """Makes the whole page of a folder anew, and returns where it is."""
    drop_data(folder.directory, lambda step: not step_file(folder.directory, step).exists())
    steps = folder.steps()
    written = _write_steps(folder, steps)
    # Rounds that a run has recorded since are in its index, and must stay in this one.
    written += [step for step in folder.steps() if step not in steps and data_file(folder.directory, step).exists()]
    write_index(folder.directory, entry_of(folder, written))
    write_app(folder.directory)
    return folder.directory / PAGE_FILE


def bring_in_line(folder: Folder, own: int) -> list[int]:
    """Makes data of steps that have none, or an older one than their file, and removes that of steps without a file.

    Args:
        own: The step that the caller writes itself, whose file may be half a moment away.

    Returns:
        The other steps that have data then.
    """
    steps = [step for step in folder.steps() if step != own]
    drop_data(folder.directory, lambda step: step not in (*steps, own))
    missing = [step for step in steps if not _is_fresh(folder.directory, step)]
    failed = set(missing).difference(_write_steps(folder, missing))
    return [step for step in steps if step not in failed]


def _write_steps(folder: Folder, steps: Iterable[int]) -> list[int]:
    """Writes data, and returns the steps whose files have samples."""
    (folder.directory / DATA_FOLDER).mkdir(exist_ok=True)
    written = []
    for step in steps:
        payload = step_of(folder, step)
        if payload is not None:
            write_step(folder.directory, payload)
            data_file(
                folder.directory, step
            ).touch()  # it is newer than the step's file, where it was right already too
            written.append(step)
    return written


def one_file(*folders: Folder) -> bytes:
    """The page of a run or, of several folders, of several runs, everything in one document.

    All of it is held in memory. The same folders give the same bytes.
    """
    from verl_valgen.viewing.page import render  # a template engine

    runs, steps = [], []
    for number, folder in enumerate(folders):
        of_run = [payload for step in folder.steps() if (payload := step_of(folder, step, number)) is not None]
        steps += of_run
        runs.append(entry_of(folder, [payload["step"] for payload in of_run]))
    _tell_apart(runs)
    content = to_json({"index": index_payload(runs), "steps": steps})
    return render(base64.b64encode(gzip.compress(content, mtime=0)).decode()).encode()


def _tell_apart(runs: Sequence[Payload]) -> None:
    """Runs that are called the same are called by where they lie too or, where that is the same, by their number."""
    if len({run["name"] for run in runs}) == len(runs):
        return
    has_places = len({run["folder"] for run in runs}) == len(runs)
    for number, run in enumerate(runs, start=1):
        run["name"] += f" ({run['folder'] if has_places else number})"


def _is_fresh(directory: Path, step: int) -> bool:
    path = data_file(directory, step)
    try:
        with open(path, "rb") as file:
            is_ours = file.read(64).startswith(b'valgen.step({"format":%d,"run":0,"step":%d,' % (FORMAT, step))
        return is_ours and path.stat().st_mtime + _MAX_DELAY_S >= step_file(directory, step).stat().st_mtime
    except OSError:
        return False
