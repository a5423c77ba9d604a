"""top-k without a topk over the whole vocabulary, and what follows it over the candidates alone.

The C blocks with the largest maxima hold the C largest logits. One kernel makes the maxima, a second takes the best of
these few, a third the best of the tokens in these blocks. All the rest of a choice is one kernel, a program per row,
which compares each candidate with each other one instead of sorting them. (Over 200 lines, as what a kernel leaves for
the next one is read with both.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl_valgen.backends.fast.kernels.sampling_noise import EXACT, gumbel_noise, scaled

MAX_CANDIDATES = 1024
"""Beyond this, comparing each with each takes too long."""

_BLOCK = 32
"""Tokens of a block."""
_BLOCKS = 64
"""Blocks for one program."""
_MAX_CHOSEN_BY_KERNEL, _MAX_BLOCKS = 256, 16384
"""What one program can hold."""
_NUM_UNUSED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""The last bits of a float32 that came from another type are zero."""


@triton.jit
def _store_maxima(
    logits, row_stride, vocab_size, num_blocks, maxima, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The maximum of each block, NaN where there is one."""
    row, blocks = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    ids = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(logits + row * row_stride + ids, ids < vocab_size, other=float("-inf")).to(tl.float32)
    is_nan = values != values
    largest = tl.max(tl.where(is_nan, float("-inf"), values), 1)
    largest = tl.where(tl.max(is_nan.to(tl.int32), 1) > 0, float("nan"), largest)
    tl.store(maxima + row * num_blocks + blocks, largest, blocks < num_blocks)


@triton.jit
def _sortable(values, NUM_UNUSED_BITS: tl.constexpr):
    """int32 in the order of float32 values, NaN the largest, without bits that say nothing."""
    bits = values.to(tl.int32, bitcast=True)
    keys = tl.where(values != values, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return keys >> NUM_UNUSED_BITS


@triton.jit
def _places_of_largest(keys, number, NUM_UNUSED_BITS: tl.constexpr):
    """Which are the `number` largest of (N,) keys, the first of those that tie; and a place in 0..number-1 for each."""
    # The number-th largest, bit by bit: how many are as large?
    num_bits = 31 - NUM_UNUSED_BITS
    threshold = tl.where(tl.sum((keys >= 0).to(tl.int32)) >= number, 0, -1 << num_bits)
    for i in range(1, num_bits + 1):
        larger = threshold + (1 << (num_bits - i))
        threshold = tl.where(tl.sum((keys >= larger).to(tl.int32)) >= number, larger, threshold)
    is_larger = (keys > threshold).to(tl.int32)
    is_equal = (keys == threshold).to(tl.int32)
    is_wanted = tl.cumsum(is_equal, 0) <= number - tl.sum(is_larger)
    is_chosen = is_larger | (is_equal & is_wanted.to(tl.int32))
    return is_chosen == 1, tl.cumsum(is_chosen, 0) - 1


@triton.jit
def _choose_blocks(maxima, num_blocks, num_chosen, chosen, SIZE: tl.constexpr, NUM_UNUSED_BITS: tl.constexpr):
    row, blocks = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    values = tl.load(maxima + row * num_blocks + blocks, blocks < num_blocks, other=float("-inf"))
    keys = tl.where(blocks < num_blocks, _sortable(values, NUM_UNUSED_BITS), -1 << (31 - NUM_UNUSED_BITS))
    is_chosen, places = _places_of_largest(keys, num_chosen, NUM_UNUSED_BITS)
    tl.store(chosen + row * num_chosen + places, blocks, is_chosen)


@triton.jit
def _choose_tokens(
    logits, row_stride, vocab_size, blocks, num_chosen, values, tokens,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, NUM_UNUSED_BITS: tl.constexpr,
):  # fmt: skip
    """Of the tokens in the chosen blocks as many as there are blocks."""
    row, places = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    block = tl.load(blocks + row * num_chosen + places // BLOCK, places < num_chosen * BLOCK, other=2147483647 // BLOCK)
    ids = block * BLOCK + places % BLOCK
    found = tl.load(logits + row * row_stride + ids, ids < vocab_size, other=float("-inf")).to(tl.float32)
    keys = tl.where(ids < vocab_size, _sortable(found, NUM_UNUSED_BITS), -1 << (31 - NUM_UNUSED_BITS))
    is_chosen, places = _places_of_largest(keys, num_chosen, NUM_UNUSED_BITS)
    tl.store(values + row * num_chosen + places, found, is_chosen)
    tl.store(tokens + row * num_chosen + places, ids.to(tl.int64), is_chosen)


def largest_logits(logits: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, in any order; NaN is larger than all others.

    Args:
        logits: (B, V) of any floating type, each row in one piece.
        num_candidates: C < V.

    Returns:
        (B, C) float32 and their tokens, int64.
    """
    batch_size, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    if num_candidates > _MAX_CHOSEN_BY_KERNEL or not num_candidates < num_blocks <= _MAX_BLOCKS:
        values, tokens = logits.topk(num_candidates, sorted=False)
        return values.float(), tokens
    maxima = torch.empty(batch_size, num_blocks, dtype=torch.float32, device=logits.device)
    blocks = torch.empty(batch_size, num_candidates, dtype=torch.int32, device=logits.device)
    values = torch.empty(batch_size, num_candidates, dtype=torch.float32, device=logits.device)
    tokens = torch.empty_like(values, dtype=torch.int64)
    row = (logits, logits.stride(0), vocab_size)
    unused = {"NUM_UNUSED_BITS": _NUM_UNUSED_BITS[logits.dtype]}
    _store_maxima[triton.cdiv(num_blocks, _BLOCKS), batch_size](
        *row, num_blocks, maxima, BLOCKS=_BLOCKS, BLOCK=_BLOCK, **EXACT
    )
    _choose_blocks[(batch_size,)](
        maxima, num_blocks, num_candidates, blocks, SIZE=triton.next_power_of_2(num_blocks), num_warps=8, **unused,
        **EXACT,
    )  # fmt: skip
    _choose_tokens[(batch_size,)](
        *row, blocks, num_candidates, values, tokens, BLOCK=_BLOCK,
        SIZE=triton.next_power_of_2(num_candidates) * _BLOCK, num_warps=16, **unused, **EXACT,
    )  # fmt: skip
    return values, tokens


@triton.jit
def _choose(
    logits, token_ids, num_candidates, temperature, noise_keys, top_k, left_out, least_weight,
    tokens, had_nan, had_too_many_ties,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, DIVIDES: tl.constexpr, HAS_NOISE: tl.constexpr, HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
):  # fmt: skip
    row, places = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    logits += row * num_candidates
    token_ids += row * num_candidates
    inside = places < num_candidates
    values = tl.load(logits + places, inside, other=float("-inf"))
    ids = tl.load(token_ids + places, inside, other=2147483647)
    is_nan = values != values
    scores = scaled(tl.where(is_nan, float("inf"), values), temperature, DIVIDES)

    num_larger = tl.zeros((SIZE,), tl.int32)
    for start in range(0, SIZE, CHUNK):
        others = start + tl.arange(0, CHUNK)
        other_values = tl.load(logits + others, others < num_candidates, other=float("-inf"))
        other_scores = scaled(tl.where(other_values != other_values, float("inf"), other_values), temperature, DIVIDES)
        num_larger += tl.sum((other_scores[None, :] > scores[:, None]).to(tl.int32), 1)
    kept = inside & (num_larger < top_k)
    least = tl.min(tl.where(kept, scores, float("inf")))
    all_are_kept = tl.min(tl.where(inside, kept.to(tl.int32), 1)) == 1
    tl.store(had_too_many_ties + row, (all_are_kept & (least > float("-inf"))).to(tl.int8))

    top = tl.max(scores)
    weights = tl.exp(scores - top)
    if HAS_TOP_P:
        total = tl.sum(tl.where(kept, weights, 0.0))
        # The probability of a token and of those behind it; of equals those with smaller ids, as after a stable sort.
        behind = tl.zeros((SIZE,), tl.float32)
        for start in range(0, SIZE, CHUNK):
            others = start + tl.arange(0, CHUNK)
            is_there = others < num_candidates
            other_values = tl.load(logits + others, is_there, other=float("-inf"))
            other_ids = tl.load(token_ids + others, is_there, other=2147483647)
            other_scores = scaled(
                tl.where(other_values != other_values, float("inf"), other_values), temperature, DIVIDES
            )
            other_weights = tl.where(is_there & (other_scores >= least), tl.exp(other_scores - top) / total, 0.0)
            is_behind = other_scores[None, :] < scores[:, None]
            is_equal = other_scores[None, :] == scores[:, None]
            is_behind = is_behind | (is_equal & (other_ids[None, :] <= ids[:, None]))
            behind += tl.sum(tl.where(is_behind, other_weights[None, :], 0.0), 1)
        is_best = inside & (scores == top)
        is_last = is_best & (ids == tl.max(tl.where(is_best, ids, -1)))
        is_left_out = behind <= left_out  # false for NaN
        kept = kept & ((is_left_out == 0) | is_last)
    if HAS_MIN_P:
        is_light = weights < least_weight
        kept = kept & (is_light == 0)

    if HAS_NOISE:
        scores += gumbel_noise(tl.load(noise_keys + row), ids)
    scores = tl.where(kept, scores, float("-inf"))
    has_nan = tl.max((inside & is_nan).to(tl.int32))
    is_chosen = tl.where(has_nan > 0, is_nan.to(tl.int32), (scores == tl.max(scores)).to(tl.int32))
    tl.store(tokens + row, tl.min(tl.where(inside & (is_chosen == 1), ids, 2147483647)))
    tl.store(had_nan + row, has_nan.to(tl.int8))


def best_candidate(
    logits: Tensor, token_ids: Tensor, noise_keys: Tensor | None, temperature: tuple[float, bool], top_k: int,
    top_p: float | None, min_p: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Applies temperature, top-k, top-p, min-p and noise to candidates, and takes the best.

    Args:
        logits: (B, C) float32, the largest of each row in any order.
        token_ids: (B, C) int64.
        noise_keys: (B,) int64, or None where there is no noise.
        temperature: See `sampling_noise.temperature_argument`.

    Returns:
        The (B,) int64 tokens; (B,) bool, whether NaN is among the logits; (B,) bool, whether all candidates tie.
    """
    batch_size, num_candidates = logits.shape
    tokens = torch.empty(batch_size, dtype=torch.int64, device=logits.device)
    had_nan, had_too_many_ties = (torch.empty_like(tokens, dtype=torch.int8) for _ in range(2))
    number, divides = temperature
    size = triton.next_power_of_2(num_candidates)
    _choose[(batch_size,)](
        logits, token_ids, num_candidates, number, noise_keys, top_k, 1 - (top_p or 0.0), min_p or 0.0,
        tokens, had_nan, had_too_many_ties,
        SIZE=size, CHUNK=min(size, 64), DIVIDES=divides, HAS_NOISE=noise_keys is not None, HAS_TOP_P=top_p is not None,
        HAS_MIN_P=min_p is not None, **EXACT,
    )  # fmt: skip
    return tokens, had_nan.view(torch.bool), had_too_many_ties.view(torch.bool)
