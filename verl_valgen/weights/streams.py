"""Streams of weights: all ranks gather them together, one tensor after the other, and those that want them pull.

Every rank takes part in every gather, whatever becomes of a consumer. What the tensors are is not known here.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

from verl_valgen.collectives import agree, attempt

_T = TypeVar("_T")

Parameters = Generator[tuple[str, Tensor], None, None]
"""Pairs of a parameter's name and the whole tensor, one after the other. The tensor may be the trainer's own memory and
is valid until the next one is asked for: copy it, do not write to it. Let go of it then: its memory may be needed."""

Consumer = Callable[[Iterator[tuple[str, Tensor]]], _T]
"""Pulls pairs as `Parameters` describes them, as many as it likes."""


@torch.no_grad()
def pull(stream: Parameters, consume: Consumer[_T] | None) -> _T | None:
    """Has a consumer pull from a stream, and takes what it leaves. Collective: all ranks must call.

    Args:
        stream: Made on all ranks; a collective generator. It is exhausted, also where the consumer raises or stops
            early; a `KeyboardInterrupt` closes it.
        consume: None on a rank that wants nothing. It runs without gradients.

    Returns:
        What the consumer returns, None where there is none.

    Raises:
        Exception: What the consumer raised, once the stream is exhausted. Nothing that its frames held is alive by
            then, nor while the rest is taken: memory may be what was missing.
    """
    with closing(stream):
        result, error = None, None
        if consume is not None:
            # Not the generator itself, which one could close; and nothing that holds a pair while the next one comes.
            result, error = attempt(lambda: consume(map(tuple, stream)))  # type: ignore[arg-type]
            if error is not None:
                _clear_frames(error)
        for pair in stream:
            del pair  # perhaps the memory in which the next ones come
    if error is not None:
        raise error
    return result


def together(prepare: Callable[[], _T], device: torch.device) -> tuple[_T | None, bool]:
    """What `prepare` returns, and whether all ranks' did: else None, a generator closed. Collective: all must call.

    Raises:
        Exception: What it raised on this rank, after the last collective.
    """
    value, error = attempt(prepare)
    if not agree(error is None, device):
        if isinstance(value, Generator):
            value.close()
        if error is not None:
            raise error
        return None, False
    return value, True


def _clear_frames(error: BaseException) -> None:
    """Lets go of what the frames of an error hold, and those of the errors that it came from."""
    traceback.clear_frames(error.__traceback__)
    for earlier in (error.__cause__, error.__context__):
        if earlier is not None:
            _clear_frames(earlier)
