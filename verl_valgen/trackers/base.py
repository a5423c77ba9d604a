"""What a tracker is.

A tracker takes finished samples to one destination. It knows nothing of models, ranks or verl, and it may raise:
`composite.py` is the one place that catches, warns and disables. A tracker is opened on the trainer's thread, and used
on one of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from verl_valgen.records import Sample


class Tracker(ABC):
    """One destination of samples."""

    is_waited_for = True
    """Whether the trainer waits for a call, if only for a moment; else calls are made while it goes on."""

    is_kept = False
    """Whether it is called again however often it failed: a disk that was full may have room again."""

    @abstractmethod
    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Records the samples of the round at `step`, in their order. Called once per round."""

    @abstractmethod
    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Records numbers under their full keys (`val/gen/...`). Called after `log_samples` of the same step."""

    def close(self) -> None:  # noqa: B027  (most destinations have nothing to close)
        """Finishes what is pending. Leaves a run open that verl opened."""
