"""verl's own loggers: objects that its `fit()` makes, and keeps to itself."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from verl_valgen.patching import patched


@contextmanager
def loggers_remembered(loggers: MutableMapping[str, Any]) -> Iterator[None]:
    """While it is open, `loggers` takes what verl's `Tracking` makes: a logger for each name of `trainer.logger`.

    verl ends its runs when the last reference to the `Tracking` goes, which is at the end of `fit()`. Here is one more,
    until this is closed: rounds may still be on their way to the runs.
    """
    from verl.utils.tracking import Tracking

    original = Tracking.__init__
    alive = []

    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        alive.append(self)
        loggers.update(self.logger)

    with patched(Tracking, "__init__", remembering):
        try:
            yield
        finally:
            alive.clear()
