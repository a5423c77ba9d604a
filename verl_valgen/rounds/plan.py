"""How a round goes about it: with a copy or without, on how many ranks, how many prompts at once.

Pure functions on numbers that are the same on all ranks, so that all come to the same result without a word.
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
"""Of `generation.batch_size: auto`. Up to the first a step takes about as long as for one sequence, so that there is no
use in another rank; between the two it takes less than twice as long, so that one batch is better than two, but two
ranks are better still. (Measured: docs/performance.md.)"""

# What is left of free memory for what nobody counts: fragmentation, workspaces, other processes.
_SHARE_OF_FREE = 0.9


@dataclass(frozen=True)
class Needs:
    """What a round needs of a device, in bytes."""

    copy: int
    """The plain copy, on a rank that answers."""
    unit: int
    """What is whole at any one time during the gather, on every rank."""
    sequence: int
    """One sequence, prompt and answer, the longest."""
    logprobs: int = 0
    """To tell how likely an answer is, one at a time."""


@dataclass(frozen=True)
class Plan:
    is_sharded: bool
    """Through the sharded model, on all ranks; else with a plain copy."""
    num_ranks: int
    """Those that answer: the logging rank, and after it the next."""
    batch_size: int


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
    """
    Args:
        num_requests: At least one.
        free: Bytes that every rank has.
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
        most_ranks = min(world_size if ranks == "auto" else int(ranks), world_size, num_requests)
        size = _batch_size(batch_size, num_requests, most_ranks, (free - copy_takes) / needs.sequence)
        num_ranks = min(most_ranks, max(1, num_requests // size)) if ranks == "auto" else most_ranks
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
    """The requests of each rank that answers: neighbours, as even as may be, in their order."""
    bounds = [num_requests * i // num_ranks for i in range(num_ranks + 1)]
    return [range(begin, end) for begin, end in pairwise(bounds)]


def _batch_size(setting: int | str, num_requests: int, num_ranks: int, that_fit: float) -> int:
    """What is asked for, as far as it fits: what does not would be halved anyway."""
    share = math.ceil(num_requests / num_ranks)
    wanted = min(max(share, FULL_BATCH), LARGEST_BATCH) if setting == "auto" else int(setting)
    return max(1, int(min(wanted, that_fit)))


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def free_bytes(device: torch.device) -> float:
    """What this process can still allocate on a device; told of CUDA alone, elsewhere without limit."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def sequence_bytes(config: Any, prompt_length: int, max_new_tokens: int, dtype: torch.dtype) -> int:
    """An estimate, on the large side, of what one sequence takes while it is answered.

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


def largest_sequence_bytes(requests: Sequence[Request], config: Any, dtype: torch.dtype) -> int:
    """`sequence_bytes` of the request that takes the most, all of its beams together; 0 of none."""
    return max(
        (
            sequence_bytes(config, len(request.input_ids), most_new_tokens(request, config), dtype)
            * request.params.get("num_beams", 1)
            for request in requests
        ),
        default=0,
    )


def logprobs_bytes(requests: Sequence[Request], config: Any, dtype: torch.dtype) -> int:
    """What it takes to say how likely an answer is, of the request that takes the most; 0 where none asks for it.

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
