"""The plan of a round: with a copy, without or in an engine of others, on how many ranks, how many requests at once.

Pure functions on numbers that are the same on all ranks, so that all come to the same plan without a message. needs.py
estimates the memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from verl_valgen.backends.lengths import MOST_IN_A_BATCH


class Bounds(NamedTuple):
    """Bounds of `generation.batch_size: auto`."""

    full: int
    """Up to so many sequences a further rank gains little: a step takes about as long as for one."""
    most: int
    """So many at once are faster than fewer one after the other; more gain little, for their memory."""


BATCHES = Bounds(32, MOST_IN_A_BATCH)
"""Of batches that run until their longest answer has ended. (Measured: docs/performance.md.)"""
ROWS = Bounds(64, 256)
"""Of rows that the next request takes when an answer ends. (Measured: docs/performance.md.)"""

# The rest is for what nobody counts: fragmentation, workspaces, other processes.
_SHARE_OF_FREE = 0.9


@dataclass(frozen=True)
class Needs:
    """The memory that a round needs on a device, in bytes."""

    copy: int
    """The plain copy, on a rank that answers."""
    unit: int
    """The largest unit that is whole at any one time during the gather, on every rank."""
    sequence: int
    """The longest sequence, prompt and answer, in a batch."""
    logprobs: int = 0
    """The log-probability of one answer; they are computed one at a time."""
    row: int | None = None
    """The longest sequence in a row that is refilled; None where a copy answers in batches."""
    prompts: int = 0
    """What is read at once to fill rows, and what steps need whatever their number."""


@dataclass(frozen=True)
class EngineNeeds:
    """The memory that a round needs on the devices where an engine of others answers, in bytes."""

    weights: int
    """All of them; each rank of a copy holds its part."""
    unit: int
    """See `Needs.unit`."""
    sequence: Mapping[int, int]
    """Keys and values of the longest sequence on each device, by the number of ranks that hold a copy together."""
    fixed: int
    """What it takes on each device besides."""
    fixed_if_kept: int
    """What of `fixed` an engine takes once more that is kept, asleep, from round to round."""


@dataclass(frozen=True)
class Plan:
    """How a round is answered."""

    is_sharded: bool
    """Whether all ranks answer through the sharded model; else some answer with a plain copy."""
    num_ranks: int
    """Number of ranks that answer: the logging rank and those after it."""
    batch_size: int
    """Most requests that one rank answers at once."""
    ranks_per_copy: int = 1
    """So many ranks hold a copy of the weights together, and answer the same requests: contiguous groups of all ranks,
    of which the logging rank's is the first to answer."""

    def position(self, rank: int, logging_rank: int, world_size: int) -> int:
        """Which copy a rank has a part of, counted from the logging rank's; those from `num_copies` on answer
        nothing."""
        return (rank // self.ranks_per_copy - logging_rank // self.ranks_per_copy) % (world_size // self.ranks_per_copy)

    @property
    def num_copies(self) -> int:
        return self.num_ranks // self.ranks_per_copy

    def first_rank(self, position: int, logging_rank: int, world_size: int) -> int:
        """The first of the ranks that have the copy at a position."""
        num_groups = world_size // self.ranks_per_copy
        return (logging_rank // self.ranks_per_copy + position) % num_groups * self.ranks_per_copy


def make_plan(
    num_requests: int,
    needs: Needs,
    free: float,
    world_size: int,
    *,
    gather: str,
    ranks: int | str,
    batch_size: int | str,
    why_not_sharded: str | None,
) -> Plan:
    """Chooses between copy and sharded model, and the numbers of ranks and requests at once.

    Args:
        num_requests: At least one.
        free: Bytes that are free on every rank.
        gather, ranks, batch_size: The settings of these names.
        why_not_sharded: Why the sharded model cannot generate; None where it can.

    Raises:
        MemoryError: Neither way fits.
        ValueError: `gather` asks for what the model cannot do.
    """
    free *= _SHARE_OF_FREE
    sharded_takes = needs.unit + needs.logprobs
    copy_takes = needs.copy + sharded_takes + needs.prompts
    bounds, sequence = (BATCHES, needs.sequence) if needs.row is None else (ROWS, needs.row)
    if gather != "sharded" and copy_takes + sequence <= free:
        max_ranks = min(world_size if ranks == "auto" else int(ranks), world_size, num_requests)
        num_that_fit = (free - copy_takes) / sequence
        size = _batch_size(batch_size, bounds, num_requests / max_ranks, num_that_fit)
        num_ranks = min(max_ranks, max(1, num_requests // size)) if ranks == "auto" else max_ranks
        return Plan(False, num_ranks, _batch_size(batch_size, bounds, num_requests / num_ranks, num_that_fit))
    if gather != "copy" and why_not_sharded is None and sharded_takes + needs.sequence <= free:
        num_that_fit = (free - sharded_takes) / needs.sequence
        return Plan(True, world_size, _batch_size(batch_size, BATCHES, num_requests / world_size, num_that_fit))
    if gather == "sharded" and why_not_sharded is not None:
        raise ValueError(f"generation.gather=sharded: {why_not_sharded}")
    least = sharded_takes + needs.sequence if gather == "sharded" else copy_takes + sequence
    message = f"a round needs {_gib(least)} on each device that answers, and {_gib(free)} can be had"
    if gather == "auto":
        message += f" (without a copy: {why_not_sharded or _gib(sharded_takes + needs.sequence)})"
    raise MemoryError(message)


def make_engine_plan(
    num_requests: int,
    needs: EngineNeeds,
    free: float,
    world_size: int,
    *,
    tensor_parallel: int | str,
    ranks: int | str,
    batch_size: int | str,
    ranks_per_kept_copy: int = 0,
) -> Plan:
    """Chooses how many ranks hold the weights of an engine together: the fewest that have room for a sequence, or as
    many as before where an engine sleeps on all ranks, as it takes a minute to make one.

    Args:
        num_requests: At least one.
        free: Bytes that are free on every rank, what an engine that sleeps has kept left out.
        tensor_parallel, ranks, batch_size: The settings of these names.
        ranks_per_kept_copy: Of the engine that sleeps on all ranks; 0 for none.

    Raises:
        MemoryError: There is no room, not even on all ranks together where that may be chosen.
        ValueError: `tensor_parallel` is a number by which the model, or the ranks, cannot be divided.
    """
    free *= _SHARE_OF_FREE
    possible = sorted(needs.sequence)
    if tensor_parallel != "auto":
        if tensor_parallel not in needs.sequence:
            raise ValueError(
                f"generation.tensor_parallel={tensor_parallel}: {world_size} ranks can hold this model together in "
                f"groups of {', '.join(map(str, possible))}"
            )
        possible = [int(tensor_parallel)]

    possible.sort(key=lambda ranks_per_copy: ranks_per_copy != ranks_per_kept_copy)

    def takes(ranks_per_copy: int) -> float:
        fixed = needs.fixed_if_kept if ranks_per_copy == ranks_per_kept_copy else needs.fixed
        return needs.weights / ranks_per_copy + needs.unit + fixed

    fitting = [n for n in possible if takes(n) + needs.sequence[n] <= free]
    if not fitting:
        most = max(possible)
        raise MemoryError(
            f"vLLM needs {_gib(takes(most) + needs.sequence[most])} on each device"
            f"{f' of {most} that hold the model together' if most > 1 else ''}, and {_gib(free)} can be had"
        )
    ranks_per_copy = fitting[0]
    num_that_fit = (free - takes(ranks_per_copy)) / needs.sequence[ranks_per_copy]
    most = world_size if ranks == "auto" else min(int(ranks), world_size)
    max_copies = min(max(1, most // ranks_per_copy), num_requests)
    size = _batch_size(batch_size, ROWS, num_requests / max_copies, num_that_fit)
    num_copies = min(max_copies, max(1, num_requests // size)) if ranks == "auto" else max_copies
    size = _batch_size(batch_size, ROWS, num_requests / num_copies, num_that_fit)
    return Plan(False, num_copies * ranks_per_copy, size, ranks_per_copy)


def shares(num_requests: int, num_ranks: int) -> list[range]:
    """The indices of each answering rank's requests: contiguous, in order, and as evenly divided as possible."""
    bounds = [num_requests * i // num_ranks for i in range(num_ranks + 1)]
    return [range(begin, end) for begin, end in pairwise(bounds)]


def _batch_size(setting: int | str, bounds: Bounds, share: float, num_that_fit: float) -> int:
    """The batch size that is asked for, as far as it fits: a larger one would be halved anyway.

    Args:
        share: The number of requests of a rank, on average.
    """
    wanted = min(max(math.ceil(share), bounds.full), bounds.most) if setting == "auto" else int(setting)
    return max(1, int(min(wanted, num_that_fit)))


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
