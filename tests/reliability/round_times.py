"""How long each round of a run took on a rank, and when its training ended: written by the run, read by its test."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any


def notes_of(directory: Path, rank: int = 0) -> dict[str, Any]:
    """`round_s`, seconds by step (as text); `ended_at`, as `time.time()` is; and what the run added."""
    return json.loads(_path(directory, rank).read_text())


def watch_rounds(
    around: Callable[[int], AbstractContextManager[None]], also: Callable[[], dict[str, Any]] = dict
) -> None:
    """Notes the rounds of this rank, to be called before the trainer's program runs.

    Args:
        around: Of a step; open around its round, and not counted.
        also: What else is to be noted at the end.
    """
    from verl_valgen.rounds.rounds import ValidationRounds

    round_s: dict[int, float] = {}
    make_round, end = ValidationRounds.run, ValidationRounds.__exit__

    def run(self: ValidationRounds, step: int) -> None:
        with around(step):
            start = time.monotonic()
            make_round(self, step)
            round_s[step] = time.monotonic() - start

    def leave(self: ValidationRounds, *exc_info: object) -> None:
        path = _path(Path(), int(os.environ.get("RANK", "0")))
        path.write_text(json.dumps({"round_s": round_s, "ended_at": time.time(), **also()}))
        end(self, *exc_info)

    ValidationRounds.run, ValidationRounds.__exit__ = run, leave  # type: ignore[method-assign]


def _path(directory: Path, rank: int) -> Path:
    return directory / f"rounds_{rank}.json"
