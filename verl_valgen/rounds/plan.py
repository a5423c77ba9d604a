"""The plan of a round, and the memory that it needs: with a copy or without, on how many ranks, in what batches.

`make_plan` and `shares` are pure functions on numbers that are the same on all ranks, so that all come to the same plan
without a message.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from verl_valgen.backends.batching import most_new_tokens
from verl_valgen.records import Request

FULL_BATCH, LARGEST_BATCH = 32, 64
"""Bounds of `generation.batch_size: auto`.

Up to FULL_BATCH sequences a decoding step takes as long as for one, so a second rank gains nothing. Up to LARGEST_BATCH
it takes less than twice as long, so one batch beats two on the same rank. (Measured: docs/performance.md.)
"""

# The rest is for what nobody counts: fragmentation, workspaces, other processes.
_SHARE_OF_FREE = 0.9

_JUDGING_BYTES = 2**28
"""What judging.py makes of some rows of logits at a time."""


@dataclass(frozen=True)
class Needs:
    """The memory that a round needs on a device, in bytes."""

    copy: int
    """The plain copy, on a rank that answers."""
    unit: int
    """The largest unit that is whole at any one time during the gather, on every rank."""
    sequence: int
    """The longest sequence, prompt and answer."""
    logprobs: int = 0
    """The log-probability of one answer; they are computed one at a time."""


@dataclass(frozen=True)
class Plan:
    """How a round is answered."""

    is_sharded: bool
    """Whether all ranks answer through the sharded model; else some answer with a plain copy."""
    num_ranks: int
    """Number of ranks that answer: the logging rank and those after it."""
    batch_size: int
    """Most requests that one rank answers at once."""


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
    copy_takes = needs.copy + sharded_takes
    if gather != "sharded" and copy_takes + needs.sequence <= free:
        max_ranks = min(world_size if ranks == "auto" else int(ranks), world_size, num_requests)
        size = _batch_size(batch_size, num_requests, max_ranks, (free - copy_takes) / needs.sequence)
        num_ranks = min(max_ranks, max(1, num_requests // size)) if ranks == "auto" else max_ranks
        return Plan(False, num_ranks, size)
    if gather != "copy" and why_not_sharded is None and sharded_takes + needs.sequence <= free:
        return Plan(
            True, world_size, _batch_size(batch_size, num_requests, world_size, (free - sharded_takes) / needs.sequence)
        )
    if gather == "sharded" and why_not_sharded is not None:
        raise ValueError(f"generation.gather=sharded: {why_not_sharded}")
    least = sharded_takes if gather == "sharded" else copy_takes
    message = f"a round needs {_gib(least + needs.sequence)} on each device that answers, and {_gib(free)} can be had"
    if gather == "auto":
        message += f" (without a copy: {why_not_sharded or _gib(sharded_takes + needs.sequence)})"
    raise MemoryError(message)


def shares(num_requests: int, num_ranks: int) -> list[range]:
    """The indices of each answering rank's requests: contiguous, in order, and as evenly divided as possible."""
    bounds = [num_requests * i // num_ranks for i in range(num_ranks + 1)]
    return [range(begin, end) for begin, end in pairwise(bounds)]


def _batch_size(setting: int | str, num_requests: int, num_ranks: int, num_that_fit: float) -> int:
    """The batch size that is asked for, as far as it fits: a larger one would be halved anyway."""
    share = math.ceil(num_requests / num_ranks)
    wanted = min(max(share, FULL_BATCH), LARGEST_BATCH) if setting == "auto" else int(setting)
    return max(1, int(min(wanted, num_that_fit)))


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def free_bytes(device: torch.device) -> float:
    """Bytes that this process can still allocate on a device; infinity except on CUDA, where it is known."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def sequence_bytes(config: Any, prompt_length: int, max_new_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one sequence takes while it is answered, estimated on the large side.

    Keys and values, the widest activations of the prompt's forward pass, and what logits processors make of the logits.

    Args:
        config: transformers' configuration of the text model.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * num_key_value_heads * head_dim * (prompt_length + max_new_tokens)
    intermediate_size = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    activations = prompt_length * (6 * config.hidden_size + 3 * intermediate_size)
    # A sort in float32 with its int64 indices, once more for what it gives, and a handful of temporary tensors.
    logits = 48 * config.vocab_size
    return (cache + activations) * dtype.itemsize + logits


def reading_bytes(config: Any, num_tokens: int, num_read: int, dtype: torch.dtype) -> int:
    """Bytes that a forward pass over one sequence takes beside the weights, estimated on the large side.

    Args:
        config: transformers' configuration of the text model.
        num_tokens: The sequence's length.
        num_read: The number of tokens whose logits are looked at.
    """
    logits = (num_tokens + num_read) * config.vocab_size * dtype.itemsize
    return sequence_bytes(config, num_tokens, 0, dtype) + logits + _JUDGING_BYTES


def largest_sequence_bytes(requests: Sequence[Request], config: Any, dtype: torch.dtype) -> int:
    """`sequence_bytes` of the request that takes the most, with all of its beams; 0 without requests."""
    return max(
        (
            sequence_bytes(config, len(request.input_ids), most_new_tokens(request, config), dtype)
            * request.params.get("num_beams", 1)
            for request in requests
        ),
        default=0,
    )


def logprobs_bytes(requests: Sequence[Request], config: Any, dtype: torch.dtype) -> int:
    """Bytes that the log-probability of an answer takes, for the request that takes the most; 0 where none asks for it.

    The logits of all its tokens, and in float32 three times those of the new ones.
    """
    return max(
        (
            config.vocab_size * (len(request.input_ids) * dtype.itemsize + most_new_tokens(request, config) * 12)
            for request in requests
            if request.wants_logprob
        ),
        default=0,
    )
