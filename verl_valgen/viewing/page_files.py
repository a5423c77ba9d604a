"""The files of the page: how they are called, replacing them, and taking data away that is no longer so.

    index.html                  the app, without data
    data/steps.js               which steps there are; small, and written again with each
    data/step_00000080.js       one round
    compare.html                two runs, everything in one file

Every file is replaced as a whole.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from verl_valgen.viewing.script import argument, call
from verl_valgen.viewing.whole_files import TEMPORARY_SUFFIX, replace_file

PAGE_FILE = "index.html"
COMPARE_FILE = "compare.html"
DATA_FOLDER = "data"
PAGE_FILES = (PAGE_FILE, DATA_FOLDER)
"""The page of a run."""
TEMPORARY_FILES = tuple(f"{name}*{TEMPORARY_SUFFIX}" for name in (PAGE_FILE, COMPARE_FILE, f"{DATA_FOLDER}/*.js"))
"""What a crash may leave, as patterns."""

INDEX, STEP = "valgen.index", "valgen.step"
"""The functions that the data calls."""

_DATA_FILE = re.compile(r"step_(\d{8,})\.js")


def data_file(directory: Path, step: int) -> Path:
    return directory / DATA_FOLDER / f"step_{step:08d}.js"


def steps_file(directory: Path) -> Path:
    return directory / DATA_FOLDER / "steps.js"


def drop_data(directory: Path, is_stale: Callable[[int], bool]) -> None:
    """Removes data of steps, and them from the index where there is one."""
    data = directory / DATA_FOLDER
    paths = list(data.iterdir()) if data.is_dir() else []
    stale = [path for path in paths if (match := _DATA_FILE.fullmatch(path.name)) and is_stale(int(match[1]))]
    if not stale:
        return
    for path in stale:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # the next round writes it anyway
        index = argument(INDEX, steps_file(directory).read_bytes())
        for run in index["runs"]:
            run["steps"] = [step for step in run["steps"] if not is_stale(step)]
        write_whole(steps_file(directory), call(INDEX, index))


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file, unless it holds that already."""
    with contextlib.suppress(OSError):
        if path.stat().st_size == len(content) and path.read_bytes() == content:
            return
    replace_file(path, content, writer=f".{os.getpid()}")  # a run and the command may write a page at the same time
