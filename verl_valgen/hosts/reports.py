"""What comes back from a call of Ray's workers: values, and failures as values. Knows neither Ray nor verl."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from verl_valgen import __version__
from verl_valgen.text import describe


class WorkerError(RuntimeError):
    """A worker failed; the message says how."""

    @property
    def one_line(self) -> str:
        """What it is described by: the worker's exception, and not this one."""
        return str(self)


class WorkerMemoryError(WorkerError, MemoryError):
    """A worker had no memory left."""


class BrokenGroupError(WorkerError):
    """A collective of the workers' broke: there can be no other among them, and no training."""


@dataclass(frozen=True)
class Failure:
    """A worker's exception, as it travels: in one line, as others may not be fit to."""

    text: str
    is_for_memory: bool = False
    has_broken_group: bool = False
    """Whether it came from a collective that broke: by a rank that has gone, or by the time that it may take."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        # gloo's errors are plain ones, which begin with where in its source they came from.
        has_broken_group = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
        return cls(describe(error), isinstance(error, torch.OutOfMemoryError | MemoryError), has_broken_group)

    def as_error(self, whose: str = "") -> WorkerError:
        """
        Args:
            whose: Goes before the text.
        """
        if self.has_broken_group:
            return BrokenGroupError(whose + self.text)
        return (WorkerMemoryError if self.is_for_memory else WorkerError)(whose + self.text)


class LogLine(NamedTuple):
    """A record of a worker's log."""

    logger: str
    level: int
    message: str


@dataclass(frozen=True)
class Report:
    """What a call of a worker gives."""

    rank: int
    is_logging_rank: bool
    value: Any
    failure: Failure | None
    lines: list[LogLine]
    """What was logged since the last call."""
    version: str = __version__
    """The package's, on the worker's node."""

    @property
    def whose(self) -> str:
        """What goes before its lines and its failure where the driver tells them."""
        return "" if self.is_logging_rank else f"rank {self.rank}: "
