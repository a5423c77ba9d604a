"""Folders of samples for the tests of the page, as a run writes them, and reading the page's data back."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trackers.destinations import make_round, make_run, make_sample

from verl_valgen.records import BestValue, Round
from verl_valgen.trackers import open_trackers
from verl_valgen.trackers.base import TrackedRun

DESCRIPTION = {"experiment": "demo", "start_step": 0, "generation": {"best_metric": "exact", "best_mode": "min"}}


def described_run(directory: Path, *, page: bool = True) -> TrackedRun:
    run = make_run(directory, page=page, best_metric="exact", best_mode="min", console="none")
    return replace(run, description=DESCRIPTION)


def write_rounds(
    run: TrackedRun, rounds: Mapping[int, Sequence[Mapping[str, Any]]], scores: Mapping[str, float] | None = None
) -> None:
    """A process that makes rounds: {step: the fields of its samples}; the first is the best one."""
    trackers = open_trackers([], run)
    best = BestValue(0.25, min(rounds))
    for step, samples in rounds.items():
        round = make_round([make_sample(step, **{"index": i} | dict(own)) for i, own in enumerate(samples)], step)
        numbers = replace(make_round(step=step, scores=scores).numbers, num_samples=len(samples), best=best)
        trackers.log(Round(step, round.samples, numbers))
    trackers.close()
    (run.directory / "best.json").write_text(json.dumps({"metric": "exact", "mode": "min", **best._asdict()}))


def data_files(directory: Path) -> dict[str, bytes]:
    """The page's data, by the names of its files."""
    return {path.name: path.read_bytes() for path in sorted((directory / "data").iterdir())}


def parsed(script: bytes) -> tuple[str, Any]:
    """The function that a script calls, and the argument."""
    function, _, argument = script.decode("utf-8").partition("(")
    assert argument.endswith(");\n")
    return function, json.loads(argument[:-3])


def index(directory: Path) -> dict[str, Any]:
    (run,) = parsed((directory / "data" / "steps.js").read_bytes())[1]["runs"]
    return run


def step(directory: Path, number: int) -> dict[str, Any]:
    return parsed((directory / "data" / f"step_{number:08d}.js").read_bytes())[1]


def inlined(page: Path) -> dict[str, Any]:
    """The data of a page that is one file."""
    found = re.search(r'<script id="valgen-data" type="text/plain">([^<]*)</script>', page.read_text(encoding="utf-8"))
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))
