"""Trackers: where finished rounds go.

This module owns the list of destinations and which of them a run uses. A new one is a module with a `Tracker` that
takes a `TrackedRun` and has `is_live(run)`, and a line in `TRACKERS`. Importing it loads no tracker's package.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from verl_valgen.text import describe, printable
from verl_valgen.trackers.base import TrackedRun, Tracker
from verl_valgen.trackers.composite import CompositeTracker
from verl_valgen.trackers.console import ConsoleTracker
from verl_valgen.trackers.jsonl import JsonlTracker
from verl_valgen.trackers.page_copies import PageCopies

logger = logging.getLogger(__name__)

TRACKERS = {
    "wandb": "verl_valgen.trackers.wandb:WandbTracker",
    "swanlab": "verl_valgen.trackers.swanlab:SwanlabTracker",
    "mlflow": "verl_valgen.trackers.mlflow:MlflowTracker",
    "tensorboard": "verl_valgen.trackers.tensorboard:TensorboardTracker",
    "trackio": "verl_valgen.trackers.trackio:TrackioTracker",
    "clearml": "verl_valgen.trackers.clearml:ClearmlTracker",
    "vemlp_wandb": "verl_valgen.trackers.vemlp_wandb:VemlpWandbTracker",
    "file": "verl_valgen.trackers.verl_file:VerlFileTracker",
}
"""verl's name for a logger -> "module:class"."""

# By name, like the trackers: what makes pages is imported where one is made.
_PAGE = "verl_valgen.trackers.page:PageTracker"
_FOLDER = "verl_valgen.viewing.folder:Folder"
_ONE_FILE = "verl_valgen.viewing.writing:one_file"

_RENAMED = {"tracking": "wandb"}
"""Old logger names that verl still takes."""

_LOCAL = ("console",)
"""verl's loggers that have nothing to add: samples go to the console anyway."""

_WITHOUT_SAMPLES = {"rl_insight": "it takes numbers alone, and shows them without their step"}
"""verl's loggers that have no place for samples -> why."""


def open_trackers(
    loggers: str | Sequence[str], run: TrackedRun, others: Mapping[str, Tracker] | None = None
) -> CompositeTracker:
    """JSONL files, the console, the page, and each tracker among `loggers` (`trainer.logger`) that has a live run.

    To be called on the trainer's thread once verl has opened its runs. Raises nothing for a tracker that cannot be
    opened: that is a warning.

    Args:
        others: Further destinations, by name.
    """
    trackers: dict[str, Tracker] = {
        "jsonl": JsonlTracker(run.directory, run.description),
        "console": ConsoleTracker(run),
        **(others or {}),
    }
    openings: dict[str, Callable[[], Tracker | None]] = {}
    if run.settings.page:
        openings["page"] = lambda: resolve_name(_PAGE)(run)
    names = [loggers] if isinstance(loggers, str) else loggers
    for name in dict.fromkeys(_RENAMED.get(name, name) for name in names):
        if name not in _LOCAL:
            openings[name] = partial(_open_tracker, name, run)
    for name, open_tracker in openings.items():
        try:
            tracker = open_tracker()
        except Exception as error:
            logger.warning("%s: no samples there, they are in the JSONL files: %s", name, describe(error))
            continue
        if tracker is not None:
            trackers[name] = tracker
    page = PageCopies(run.directory, _page_in_one_file) if run.settings.page_to_trackers else None
    return CompositeTracker(trackers, page)


def _page_in_one_file(directory: Path) -> str:
    folder = resolve_name(_FOLDER)(directory)
    return resolve_name(_ONE_FILE)(folder).decode()


def _open_tracker(name: str, run: TrackedRun) -> Tracker | None:
    """The tracker of verl's logger `name`, or None, with a line that says why."""
    if name not in TRACKERS:
        reason = _WITHOUT_SAMPLES.get(name, "there is no adapter for it")
        logger.info("no samples in %s: %s; they are in the JSONL files", printable(name, 80), reason)
        return None
    tracker_class: Any = resolve_name(TRACKERS[name])
    if not tracker_class.is_live(run):
        logger.info("no samples in %s: it has no live run; they are in the JSONL files", name)
        return None
    return tracker_class(run)
