"""The interface of a tracker.

A tracker takes finished rounds to one destination. It knows nothing of models, ranks or verl, and it may raise:
`composite.py` is the one place that catches, warns and disables. A tracker is opened on the trainer's thread, and used
on a thread of its own.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_valgen.records import DEFAULT_STRATEGY, Round

if TYPE_CHECKING:
    from verl_valgen.settings.settings import GenerationSettings


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker may know of the run that it records."""

    directory: Path
    """The folder of the samples."""
    settings: GenerationSettings
    verl_loggers: Mapping[str, Any] = field(default_factory=dict)
    """verl's own logger objects of this run, by the names of `trainer.logger`."""
    description: Mapping[str, Any] | None = None
    """Date, name and configuration, for people; None: nothing is to be said."""

    @property
    def first_strategy(self) -> str:
        """The strategy whose answers stand for a prompt where there is room for one."""
        return next(iter(self.settings.strategies), DEFAULT_STRATEGY)


class Tracker(ABC):
    """One destination of rounds."""

    is_waited_for = True
    """Whether the trainer waits for a call, if only for a moment; else calls are made while it goes on."""

    is_kept = False
    """Whether the tracker is called again however often it failed: a disk that was full may have room again."""

    takes_unverified = False
    """Whether the tracker gets answers that failed the check too; the others get a note in their place."""

    takes_page = False
    """Whether the tracker has a place for the page of the whole run; see `add_page`."""

    @abstractmethod
    def log(self, round: Round) -> None:
        """Records the samples and numbers of one round. Called once per round; the step may lie behind verl's."""

    def add_page(self, page: str) -> None:
        """Records the page of the whole run, one HTML file. Called once, before `close`, where `takes_page`."""
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027  (most destinations have nothing to close)
        """Finishes what is pending. Leaves a run open that verl opened."""


def package_of(logger: str, module: str | None = None) -> Any:
    """Imports what a tracker needs of its package: the module that is called like the logger, or another.

    Raises:
        ImportError: The package is missing; the message names the extra to install.
    """
    try:
        return importlib.import_module(module or logger)
    except ImportError as error:
        raise ImportError(f"samples in {logger} need the package: pip install verl-valgen[{logger}]") from error
