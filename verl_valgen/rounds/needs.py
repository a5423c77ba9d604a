"""The memory that a round needs on a device, estimated on the large side. plan.py makes a plan of it.

Pure functions, but for `free_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from verl_valgen.backends.lengths import MOST_PROMPT_TOKENS, ROW_MULTIPLE, longest_sequence, most_new_tokens
from verl_valgen.records import Request

_JUDGING_BYTES = 2**28
"""What judging.py makes of some rows of logits at a time."""
_BLOCK = 128
"""Tokens of a block of vLLM's cache, at most: so many on CPU."""
ENGINE_BYTES = 4 * 2**30
"""What vLLM takes on a device besides weights, keys and values, estimated on the large side: activations of the prompts
that it reads at once, captured graphs, communicators. (Measured: docs/performance.md.)"""
ENGINE_AWAKE_BYTES = 2**30
"""What of that an engine which was asleep takes once more."""
_WORKSPACE_BYTES = 2**25
"""What cuBLAS keeps for the stream on which steps are captured, at most: so much on Hopper."""


def free_bytes(device: torch.device) -> float:
    """Bytes that this process can still allocate on a device; infinity except on CUDA, where it is known."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def sequence_bytes(config: Any, prompt_length: int, max_new_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one sequence takes while it is answered in a batch, estimated on the large side.

    Keys and values, the widest activations of the prompt's forward pass, and what logits processors make of the logits.

    Args:
        config: transformers' configuration of the text model.
    """
    return row_bytes(config, prompt_length + max_new_tokens, dtype) + prompt_bytes(config, prompt_length, dtype)


def row_bytes(config: Any, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a sequence of so many tokens takes in steps, estimated on the large side.

    Keys and values, and what logits processors make of the logits: a sort in float32 with its int64 indices, once more
    for what it gives, and a handful of temporary tensors.

    Args:
        config: transformers' configuration of the text model.
    """
    return cache_bytes(config, num_tokens, dtype) + 48 * config.vocab_size


def cache_bytes(config: Any, num_tokens: int, dtype: torch.dtype, ranks_per_copy: int = 1) -> int:
    """Bytes of the keys and values of so many tokens on one of the ranks that hold them together.

    Args:
        config: transformers' configuration of the text model.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own_heads = max(1, _num_key_value_heads(config) // ranks_per_copy)  # of fewer heads than ranks each has a whole one
    return 2 * config.num_hidden_layers * own_heads * head_dim * num_tokens * dtype.itemsize


def _num_key_value_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def prompt_bytes(config: Any, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the widest activations of a forward pass over so many tokens, without logits, on the large side.

    Args:
        config: transformers' configuration of the text model.
    """
    intermediate_size = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return num_tokens * (6 * config.hidden_size + 3 * intermediate_size) * dtype.itemsize


class Text(Protocol):
    """What is read, and which tokens are asked for: of the last one nothing is, so that it is only predicted."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def output_ids(self) -> list[int]: ...


def reading_bytes(config: Any, num_tokens: int, num_read: int, dtype: torch.dtype, num_texts: int = 1) -> int:
    """Bytes that a forward pass over texts takes beside the weights, estimated on the large side.

    Args:
        config: transformers' configuration of the text model.
        num_tokens: The length of the longest text, to which the others are padded.
        num_read: The largest number of tokens of a text whose logits are looked at.
    """
    logits = (num_tokens + num_read) * config.vocab_size * dtype.itemsize
    return num_texts * (sequence_bytes(config, num_tokens, 0, dtype) + logits) + _JUDGING_BYTES


def largest_reading_bytes(batches: Iterable[Sequence[Text]], config: Any, dtype: torch.dtype) -> int:
    """`reading_bytes` of the batch that takes the most, of at least one: they are read one after the other.

    Args:
        config: transformers' configuration of the model or of its text model.
    """
    config = config.get_text_config()
    return max(
        reading_bytes(
            config,
            max(len(text.input_ids) for text in batch),
            max(len(text.output_ids) for text in batch),
            dtype,
            len(batch),
        )
        for batch in batches
    )


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


def rows_need(requests: Sequence[Request], config: Any, dtype: torch.dtype) -> tuple[int, int]:
    """`Needs.row` and `Needs.prompts` of requests, of which there is at least one.

    All rows are as long as the longest sequence. Prompts are padded to the longest of those that are read at once; to
    what these take comes what is needed once.
    """
    prompts = [len(request.input_ids) for request in requests]
    longest = longest_sequence(requests, config)
    at_once = min(len(prompts) * max(prompts), max(MOST_PROMPT_TOKENS, *prompts))
    row = row_bytes(config, ROW_MULTIPLE * math.ceil(longest / ROW_MULTIPLE), dtype)
    return row, prompt_bytes(config, at_once, dtype) + _WORKSPACE_BYTES


def engine_sequence_bytes(
    requests: Sequence[Request], config: Any, dtype: torch.dtype, world_size: int
) -> dict[int, int]:
    """`EngineNeeds.sequence` of requests: by each number of ranks in which all ranks, and the model's attention heads,
    can be divided evenly, and its heads of keys and values too, or else so many ranks have the same one."""
    text, num_tokens = config.get_text_config(), engine_tokens(requests, config)
    num_heads, num_kv = text.num_attention_heads, _num_key_value_heads(text)
    possible = [n for n in range(1, world_size + 1) if world_size % n == 0 and num_heads % n == 0]
    possible = [n for n in possible if num_kv % n == 0 or n % num_kv == 0]
    return {n: cache_bytes(text, num_tokens, dtype, n) for n in possible}


def engine_tokens(requests: Sequence[Request], config: Any) -> int:
    """The tokens for which an engine of others keeps keys and values of each of these requests, of which there is at
    least one: those of the longest, up to whole blocks."""
    return _BLOCK * (math.ceil(longest_sequence(requests, config) / _BLOCK) + 1)


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
