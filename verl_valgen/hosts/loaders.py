"""Data loaders that tell what the loop over them does.

verl's `fit()` has validation written out in its body and no hook around it, but it takes its batches from loaders that
are attributes of the trainer: an iterable in their place yields the same batches and learns when a loop is over. All
that is not iteration (`len`, `state_dict`, ...) goes to the loader itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from verl_valgen.patching import patched
from verl_valgen.text import describe

logger = logging.getLogger(__name__)


def num_batches_left(loader: Any) -> int:
    """The batches that the next loop over torchdata's `StatefulDataLoader` will get.

    One that was restored goes on behind the batches of its state, and there may be none: verl saves the state while the
    last batch of an epoch is in use.
    """
    state = getattr(loader, "next_iter_state", None)
    try:
        return _num_left(loader, state) if state else len(loader)
    except (AttributeError, KeyError, TypeError) as e:  # another version's state, a loader of somebody's own
        logger.debug("how many batches a restored loader still has is not known: %s", describe(e))
        return len(loader)


def _num_left(loader: Any, state: Mapping[str, Any]) -> int:
    if state["_iterator_finished"]:  # then a new iterator takes its place
        return len(loader)
    since_snapshot = 0
    if "_snapshot" in state:  # of a loader with workers
        since_snapshot, state = state["_steps_since_snapshot"], state["_snapshot"]["_main_snapshot"]
    # Samples are what has been given out, where the batch size is another one now.
    samples = (state["_sampler_iter_state"] or {}).get(
        "samples_yielded", state["_sampler_iter_yielded"] * loader.batch_size
    )
    return max(0, (len(loader.sampler) - samples) // loader.batch_size - since_snapshot)


@contextmanager
def hooked(
    trainer: Any, hook: Callable[[int], None], *, before_train: bool, at_batch: Callable[[], None] | None = None
) -> Iterator[None]:
    """While it is open, every validation of the trainer's `fit()` ends with `hook(step)`.

    Args:
        trainer: Has `train_dataloader`, `val_dataloader` and `resume_global_step`.
        before_train: Whether it is called before the first training batch as well, with the step that the run starts
            from. verl has opened its trackers by then.
        at_batch: Called before each training batch is handed out, on the trainer's thread.
    """
    start = trainer.resume_global_step
    counter = CountingLoader(trainer.train_dataloader, start, (lambda: hook(start)) if before_train else None, at_batch)
    notifier = NotifyingLoader(trainer.val_dataloader, lambda: hook(counter.count))
    with patched(trainer, "train_dataloader", counter), patched(trainer, "val_dataloader", notifier):
        yield


class _LoaderProxy:
    """A loader whose subclasses iterate in their own way; everything else is the wrapped loader's."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class CountingLoader(_LoaderProxy):
    """Counts the batches it has yielded over all epochs; a batch in use is counted."""

    def __init__(
        self,
        loader: Any,
        start: int,
        at_start: Callable[[], None] | None = None,
        at_batch: Callable[[], None] | None = None,
    ) -> None:
        """`count` begins at `start`; `at_start` is called once, before the very first batch, `at_batch` before each."""
        super().__init__(loader)
        self.count = start
        self.at_start, self.at_batch = at_start, at_batch

    def __iter__(self) -> Iterator[Any]:
        at_start, self.at_start = self.at_start, None
        if at_start is not None:
            at_start()
        for batch in self.loader:
            if self.at_batch is not None:
                self.at_batch()
            self.count += 1
            yield batch


class NotifyingLoader(_LoaderProxy):
    """Calls `at_end` when the loop asks for the batch after the last one, and never if the loop is left early."""

    def __init__(self, loader: Any, at_end: Callable[[], None]) -> None:
        super().__init__(loader)
        self.at_end = at_end

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader
        self.at_end()
