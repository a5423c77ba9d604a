"""Collective functions by which ranks exchange values and failures: all ranks must call each of them.

A rank's failure is a value that is exchanged, never an exception that leaves others waiting. Values travel as JSON in
tensors: no pickle is read. On one rank, and without a process group, nothing is sent. All that meets is in this one
file, for that rule to be seen to hold.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from verl_valgen.text import as_exception, describe, describe_at_length

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_P = TypeVar("_P")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class OtherRankError(RuntimeError):
    """Another rank failed; the message says how."""


def agree(ok: bool, device: torch.device) -> bool:
    """Whether all ranks are ok. Collective: all ranks must call."""
    return smallest(float(ok), device) > 0


def smallest(value: float, device: torch.device) -> float:
    """The least value of all ranks, in float64. Collective: all ranks must call."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor.item()


def largest(value: float, device: torch.device) -> float:
    """The largest value of all ranks, in float64. Collective: all ranks must call."""
    return -smallest(-value, device)


def broadcast(value: Any, is_source: bool, device: torch.device) -> Any:
    """Returns the source's value on every rank, as JSON makes it: a tuple becomes a list. Collective: all must call.

    Args:
        value: Read on the source alone, which is exactly one rank.

    Raises:
        Exception: On the source, after the last collective, if its value cannot be sent; the others get None.
    """
    if world_size() == 1:
        return json.loads(json.dumps(value))
    data, error = _encoded(value) if is_source else (_NOTHING, None)
    buffer = torch.zeros(int(largest(len(data), device)), dtype=torch.uint8, device=device)
    buffer[: len(data)] = data.to(device)
    # Nobody but the source needs to know which rank it is: the others have zeros.
    dist.all_reduce(buffer, op=dist.ReduceOp.MAX)
    if error is not None:
        raise error
    return _decoded(buffer)


def gather_values(value: Any, device: torch.device) -> list[Any]:
    """Returns the values of all ranks in rank order, as JSON makes them. Collective: all ranks must call.

    Raises:
        Exception: On a rank whose value cannot be sent, after the last collective; the others get None for it.
    """
    if world_size() == 1:
        return [json.loads(json.dumps(value))]
    data, error = _encoded(value)
    sizes = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(len(data), device=device))
    lengths = [int(size.item()) for size in sizes]
    buffers = [torch.zeros(max(lengths), dtype=torch.uint8, device=device) for _ in lengths]
    padded = torch.zeros_like(buffers[0])
    padded[: len(data)] = data.to(device)
    dist.all_gather(buffers, padded)
    if error is not None:
        raise error
    return [_decoded(buffer[:length]) for buffer, length in zip(buffers, lengths, strict=True)]


def run_on_all_ranks(
    function: Callable[[], Any], is_logging_rank: bool, device: torch.device | None
) -> list[Any] | None:
    """Runs `function` on every rank and gathers the results, as JSON makes them, in rank order. Collective: all ranks
    must call.

    Args:
        device: None where only the logging rank has a result: then nothing is exchanged.

    Returns:
        None on the other ranks if any rank failed; the logging rank raises instead.

    Raises:
        Exception: On the logging rank alone, after the last collective: what failed there, or `OtherRankError` for what
            failed elsewhere.
    """
    value, error = attempt(function)
    report = [value, None if error is None else describe(error)]
    try:
        reports = [report] if device is None else gather_values(report, device)
    except Exception as e:  # this rank's value cannot be sent
        reports, error = [[None, describe(e)]], e
    reports = [report or [None, "what it found could not be sent"] for report in reports]
    failure = _failure_of_ranks([text for _, text in reports])
    if failure is None:
        return [value for value, _ in reports]
    if not is_logging_rank:
        if error is not None:
            logger.debug("this rank failed: %s", describe_at_length(error))
        return None
    raise error or failure


def on_all_or_none(function: Callable[[], object], device: torch.device) -> None:
    """Runs `function` on every rank. Collective: all ranks must call.

    Raises:
        Exception: On all ranks, where one failed: what it raised there, elsewhere `OtherRankError`.
    """
    _, error = attempt(function)
    failure = _failure_of_ranks(gather_values(None if error is None else describe(error), device))
    if failure is not None:
        raise error or failure


def _failure_of_ranks(reasons: Sequence[str | None]) -> OtherRankError | None:
    """One error of what failed on the ranks, in their order; None where nothing did."""
    failed = {rank: text for rank, text in enumerate(reasons) if text is not None}
    return OtherRankError("; ".join(f"rank {rank}: {text}" for rank, text in failed.items())) if failed else None


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


def pull(stream: Generator[_P, None, None], consume: Callable[[Iterator[_P]], _T] | None) -> _T | None:
    """Has a consumer pull from a collective generator, and takes what it leaves. Collective: all ranks must call.

    Args:
        stream: Exhausted on all ranks, also where a consumer raises or stops early; a `KeyboardInterrupt` closes it.
        consume: None on a rank that wants nothing. It may take as many as it likes.

    Returns:
        What the consumer returns, None where there is none.

    Raises:
        Exception: What the consumer raised, once the stream is exhausted. Nothing that its frames held is alive by
            then, nor while the rest is taken: memory may be what was missing.
    """
    with closing(stream):
        result, error = None, None
        if consume is not None:
            # Not the generator itself, which one could close; and nothing that holds one while the next one comes.
            result, error = attempt(lambda: consume(map(_itself, stream)))
            if error is not None:
                clear_frames(error)
        for item in stream:
            del item  # perhaps the memory in which the next ones come
    if error is not None:
        raise error
    return result


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Returns (result of `function`, None), or (None, the exception that it raised). Not collective.

    The exception's frames are cleared: they may hold a copy of the model, whose memory is to be free when ranks meet.
    """
    try:
        return function(), None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of what is written in Rust is no Exception
        error = as_exception(e)
        traceback.clear_frames(e.__traceback__)
        return None, error


def clear_frames(error: BaseException) -> None:
    """Lets go of what the frames of an error hold, and those of the errors that it came from."""
    traceback.clear_frames(error.__traceback__)
    for earlier in (error.__cause__, error.__context__):
        if earlier is not None:
            clear_frames(earlier)


def _itself(item: _P) -> _P:
    return item


_NOTHING = torch.zeros(0, dtype=torch.uint8)


def _encoded(value: Any) -> tuple[Tensor, Exception | None]:
    """The value as bytes of JSON, or nothing and the reason why it cannot be sent."""
    try:
        # JSON escapes whatever is not ASCII.
        return torch.frombuffer(bytearray(json.dumps(value).encode("ascii")), dtype=torch.uint8), None
    except Exception as e:
        return _NOTHING, e


def _decoded(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes() or b"null")
