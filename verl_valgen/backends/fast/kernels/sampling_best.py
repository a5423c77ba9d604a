"""The best token of a whole vocabulary, in one pass over it: each program has a part of a row, a second kernel reduces.

Noise is made only where its token could still be the best.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl_valgen.backends.fast.kernels.sampling_noise import EXACT, PART, gumbel_of, may_exceed, random_words, scaled

_CHUNK = 1024
"""Tokens that a program looks at together: it makes noise for all or none of them."""
_MANY_PROGRAMS, _RATIO = 2048, 4
"""Beyond so many programs each looks at more tokens: the further it is, the more seldom noise changes its best."""
_LARGEST_NOISE = tl.constexpr(37.0)
"""No noise is as large (`sampling.gumbel_noise`)."""


@triton.jit
def _best_of_parts(
    logits, row_stride, vocab_size, num_parts, temperature, noise_keys, limits, ties, num_tie_parts,
    best_scores, best_tokens, nan_tokens,
    PART: tl.constexpr, CHUNK: tl.constexpr, TIE_PARTS: tl.constexpr, RATIO: tl.constexpr, DIVIDES: tl.constexpr,
    HAS_NOISE: tl.constexpr, HAS_LIMITS: tl.constexpr, CUTS_TIES: tl.constexpr,
):  # fmt: skip
    """For each part of each row: the best score, the first token that has it, and the first NaN (V where none is)."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if HAS_NOISE:
        key = tl.load(noise_keys + row)
    if HAS_LIMITS:
        top, least_weight = tl.load(limits + row * 8), tl.load(limits + row * 8 + 1)
        kept_below, ties_below = tl.load(limits + row * 8 + 2), tl.load(limits + row * 8 + 3)
    if CUTS_TIES:  # the first of the tokens that tie at the edge are removed, as after a stable sort
        others = tl.arange(0, TIE_PARTS)
        num_ties = tl.load(ties + row * num_tie_parts + others, others < num_tie_parts, other=0)
        num_removed = tl.sum(num_ties) - tl.load(limits + row * 8 + 6).to(tl.int32)
        rank = tl.sum(tl.where(others < part * RATIO, num_ties, 0))
        has_ties = tl.sum(tl.where(others < (part + 1) * RATIO, num_ties, 0)) > rank
    best = float("-inf")
    best_token = part * PART
    nan_token = vocab_size
    for start in range(0, PART, CHUNK):
        ids = part * PART + start + tl.arange(0, CHUNK)
        inside = ids < vocab_size
        scores = scaled(
            tl.load(logits + row * row_stride + ids, inside, other=float("-inf")).to(tl.float32), temperature, DIVIDES
        )
        is_nan = scores != scores
        nan_token = tl.minimum(nan_token, tl.min(tl.where(is_nan, ids, vocab_size)))
        scores = tl.where(is_nan, float("-inf"), scores)
        if HAS_LIMITS:
            distances = top - scores
            kept = distances <= kept_below
            if CUTS_TIES:  # noqa: SIM102 (when it is compiled; the next when it runs)
                if has_ties:
                    is_tie = ((distances <= ties_below) & (distances > kept_below)).to(tl.int32)
                    ranks = rank + tl.cumsum(is_tie, 0) - is_tie
                    kept = kept | ((is_tie == 1) & (ranks >= num_removed))
                    rank += tl.sum(is_tie)
            kept = kept & (tl.exp(-distances) >= least_weight)
            scores = tl.where(kept, scores, float("-inf"))
        chunk_best = tl.max(scores)
        if HAS_NOISE:  # noqa: SIM102
            if chunk_best + _LARGEST_NOISE > best:
                words = random_words(key, ids)
                # Where none may exceed the best, none does without noise either.
                if tl.max(may_exceed(words, scores, best).to(tl.int32)) > 0:
                    scores += gumbel_of(words)
                    chunk_best = tl.max(scores)
        chunk_token = tl.min(tl.where((scores == chunk_best) & inside, ids, vocab_size))
        best_token = tl.where(chunk_best > best, chunk_token, best_token)
        best = tl.maximum(chunk_best, best)
    place = row * num_parts + part
    tl.store(best_scores + place, best)
    tl.store(best_tokens + place, best_token)
    tl.store(nan_tokens + place, nan_token)


@triton.jit
def _best_of_rows(
    best_scores, best_tokens, nan_tokens, vocab_size, num_parts, tokens, had_nan, PARTS: tl.constexpr
):  # fmt: skip
    row, parts = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    places, inside = row * num_parts + parts, parts < num_parts
    scores = tl.load(best_scores + places, inside, other=float("-inf"))
    ids = tl.load(best_tokens + places, inside, other=vocab_size)
    first_nan = tl.min(tl.load(nan_tokens + places, inside, other=vocab_size))
    best = tl.min(tl.where(scores == tl.max(scores), ids, vocab_size))
    tl.store(tokens + row, tl.where(first_nan < vocab_size, first_nan, best).to(tl.int64))
    tl.store(had_nan + row, (first_nan < vocab_size).to(tl.int8))


def best_tokens(
    logits: Tensor,
    noise_keys: Tensor | None,
    temperature: tuple[float, bool],
    limits: Tensor | None,
    ties: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The token with the largest score of each row; the first of several, and NaN is the largest, as in torch.argmax.

    Args:
        logits: (B, V) of any floating type, each row in one piece.
        noise_keys: (B,) int64, or None where there is no noise.
        temperature: See `sampling_noise.temperature_argument`.
        limits: Which tokens are kept, see `sampling_nucleus.Nucleus`; None: all.
        ties: Which of those that tie.

    Returns:
        (B,) int64 tokens; (B,) bool, whether NaN is among the logits.
    """
    batch_size, vocab_size = logits.shape
    num_tie_parts = triton.cdiv(vocab_size, PART)
    ratio = _RATIO if batch_size * num_tie_parts > _MANY_PROGRAMS else 1
    num_parts = triton.cdiv(num_tie_parts, ratio)
    scores = torch.empty(batch_size, num_parts, dtype=torch.float32, device=logits.device)
    part_tokens, nan_tokens = (torch.empty_like(scores, dtype=torch.int32) for _ in range(2))
    number, divides = temperature
    _best_of_parts[num_parts, batch_size](
        logits, logits.stride(0), vocab_size, num_parts, number, noise_keys,
        limits, ties, num_tie_parts, scores, part_tokens, nan_tokens,
        PART=PART * ratio, CHUNK=_CHUNK, TIE_PARTS=triton.next_power_of_2(num_tie_parts), RATIO=ratio,
        DIVIDES=divides, HAS_NOISE=noise_keys is not None,
        HAS_LIMITS=limits is not None, CUTS_TIES=ties is not None, **EXACT,
    )  # fmt: skip
    tokens = torch.empty(batch_size, dtype=torch.int64, device=logits.device)
    had_nan = torch.empty(batch_size, dtype=torch.int8, device=logits.device)
    _best_of_rows[(batch_size,)](
        scores, part_tokens, nan_tokens, vocab_size, num_parts, tokens, had_nan,
        PARTS=triton.next_power_of_2(num_parts), **EXACT,
    )  # fmt: skip
    return tokens, had_nan.view(torch.bool)
