"""Which tokens top-p and min-p keep of a whole vocabulary, without sorting it.

A token's weight is e^(score - largest score), so what is kept is a matter of the *distance* from the largest score.
The distance at which the weights add up to top_p is searched for: each pass over the vocabulary adds up the weights
within several distances, which makes the interval an eighth. It is over when all tokens within the interval have the
same distance (with bfloat16 logits that is soon), or when it is narrower than what float32 sums can tell apart: what it
holds then ties. Of those that tie as many are kept as transformers keeps, the last ones of the vocabulary, as after a
stable sort.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl_valgen.backends.fast.kernels.sampling_noise import EXACT, PART, scaled

_NUM_PASSES = 8
_FANOUT = 8


class Nucleus(NamedTuple):
    """The tokens that are kept of each of B rows."""

    limits: Tensor
    """(B, 8) float32 per row: the largest score, the least weight, the distance up to which tokens are kept, the
    distance up to which they tie; the weight to be reached, the weight within the third number, how many ties are
    kept, and whether the search is over. Where the largest score is not finite, all tokens are kept."""
    ties: Tensor | None
    """(B, P) int32: how many tokens of each of a row's P parts tie. None: there is no top-p."""


@triton.jit
def _summarise_parts(
    logits, row_stride, vocab_size, num_parts, temperature, summaries, PART: tl.constexpr, DIVIDES: tl.constexpr
):  # fmt: skip
    """The largest score of a part, the least that is not -inf, and the sum of e^(score - largest)."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = part * PART + tl.arange(0, PART)
    scores = tl.load(logits + row * row_stride + ids, ids < vocab_size, other=float("-inf")).to(tl.float32)
    scores = scaled(tl.where(scores == scores, scores, float("-inf")), temperature, DIVIDES)
    top = tl.max(scores)
    place = summaries + (row * num_parts + part) * 3
    tl.store(place, top)
    tl.store(place + 1, tl.min(tl.where(scores > float("-inf"), scores, float("inf"))))
    tl.store(place + 2, tl.sum(tl.exp(scores - tl.where(top > float("-inf"), top, 0.0))))


@triton.jit
def _begin(
    summaries, limits, num_parts, top_p, least_weight, farthest, PARTS: tl.constexpr, HAS_TOP_P: tl.constexpr
):  # fmt: skip
    row, parts = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    inside = parts < num_parts
    places = summaries + (row * num_parts + parts) * 3
    tops = tl.load(places, inside, other=float("-inf"))
    top = tl.max(tops)
    is_finite = (top > float("-inf")) & (top < float("inf"))
    top = tl.where(is_finite, top, 0.0)
    kept_below = float("inf")
    ties_below = float("inf")
    to_reach = 0.0
    if HAS_TOP_P:
        total = tl.sum(tl.load(places + 2, inside, other=0.0) * tl.exp(tops - top))
        lowest = tl.min(tl.load(places + 1, inside, other=float("inf")))
        # All that lies farther has less than what top-p leaves out.
        ties_below = tl.where(is_finite, tl.minimum(top - lowest, farthest), float("inf"))
        kept_below = tl.where(is_finite, -1e-6 * ties_below - 1e-9, float("inf"))
        to_reach = tl.maximum(total * top_p, 0.5)  # the best token has 1
    place = limits + row * 8
    tl.store(place, top)
    tl.store(place + 1, tl.where(is_finite, least_weight, 0.0))
    tl.store(place + 2, kept_below)
    tl.store(place + 3, ties_below)
    tl.store(place + 4, to_reach)
    tl.store(place + 5, 0.0)
    tl.store(place + 6, 0.0)
    tl.store(place + 7, tl.where(is_finite, 0.0, 1.0))


@triton.jit
def _sum_weights(
    logits, row_stride, vocab_size, num_parts, temperature, limits, sums, extremes,
    PART: tl.constexpr, DIVIDES: tl.constexpr, FANOUT: tl.constexpr,
):  # fmt: skip
    """The weights of a part from the begin of a row's interval to each of the distances that divide it.

    And the nearest and the farthest distance within it.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    limits += row * 8
    if tl.load(limits + 7) == 0:
        top, below, above = tl.load(limits), tl.load(limits + 2), tl.load(limits + 3)
        ids = part * PART + tl.arange(0, PART)
        scores = tl.load(logits + row * row_stride + ids, ids < vocab_size, other=float("-inf")).to(tl.float32)
        distances = top - scaled(tl.where(scores == scores, scores, float("-inf")), temperature, DIVIDES)
        is_inside = (distances > below) & (distances <= above)
        weights = tl.where(is_inside, tl.exp(-distances), 0.0)
        place = row * num_parts + part
        tl.store(extremes + place * 2, tl.min(tl.where(is_inside, distances, float("inf"))))
        tl.store(extremes + place * 2 + 1, tl.max(tl.where(is_inside, distances, float("-inf"))))
        for i in tl.static_range(1, FANOUT):
            distance = below + (above - below) * (i / FANOUT)
            tl.store(sums + place * FANOUT + i - 1, tl.sum(tl.where(distances <= distance, weights, 0.0)))
        tl.store(sums + place * FANOUT + FANOUT - 1, tl.sum(weights))


@triton.jit
def _narrow(sums, extremes, limits, num_parts, PARTS: tl.constexpr, FANOUT: tl.constexpr):
    """Goes on in that part of a row's interval in which the weight is reached, unless all within it tie."""
    row, parts, steps = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, FANOUT)
    limits += row * 8
    if tl.load(limits + 7) == 0:
        below, above, to_reach, weight = (
            tl.load(limits + 2), tl.load(limits + 3), tl.load(limits + 4), tl.load(limits + 5),
        )  # fmt: skip
        places, are_there = row * num_parts + parts, parts < num_parts
        nearest = tl.min(tl.load(extremes + places * 2, are_there, other=float("inf")))
        farthest = tl.max(tl.load(extremes + places * 2 + 1, are_there, other=float("-inf")))
        if nearest == farthest:
            tl.store(limits + 3, farthest)
            tl.store(limits + 7, 1.0)
        else:
            of_parts = tl.load(sums + places[:, None] * FANOUT + steps[None, :], are_there[:, None], other=0.0)
            totals = weight + tl.sum(of_parts, 0)  # (FANOUT,)
            # The first distance that reaches it. The last one does, but for rounding.
            step = tl.minimum(tl.sum((totals < to_reach).to(tl.int32)), FANOUT - 1)
            if step > 0:
                tl.store(limits + 2, below + (above - below) * (step / FANOUT))
                tl.store(limits + 5, tl.sum(tl.where(steps == step - 1, totals, 0.0)))
            if step < FANOUT - 1:
                tl.store(limits + 3, below + (above - below) * ((step + 1) / FANOUT))


@triton.jit
def _count_ties(
    logits, row_stride, vocab_size, num_parts, temperature, limits, ties, PART: tl.constexpr, DIVIDES: tl.constexpr
):  # fmt: skip
    """How many tokens of a part tie; the first program of a row also says how many of all are kept."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = limits + row * 8
    top, below, above = tl.load(place), tl.load(place + 2), tl.load(place + 3)
    ids = part * PART + tl.arange(0, PART)
    scores = tl.load(logits + row * row_stride + ids, ids < vocab_size, other=float("-inf")).to(tl.float32)
    distances = top - scaled(tl.where(scores == scores, scores, float("-inf")), temperature, DIVIDES)
    tl.store(ties + row * num_parts + part, tl.sum(((distances > below) & (distances <= above)).to(tl.int32)))
    if part == 0:
        missing = (tl.load(place + 4) - tl.load(place + 5)) / tl.exp(-above)
        tl.store(place + 6, tl.where(below < float("inf"), tl.minimum(tl.maximum(tl.ceil(missing), 1.0), 1e9), 0.0))


def find_nucleus(logits: Tensor, temperature: tuple[float, bool], top_p: float | None, min_p: float | None) -> Nucleus:
    """Finds what `TopPLogitsWarper` and then `MinPLogitsWarper` keep.

    Args:
        logits: (B, V) of any floating type, each row in one piece.
        temperature: See `sampling_noise.temperature_argument`.
        top_p: In [0, 1), or None.
        min_p: Likewise.
    """
    batch_size, vocab_size = logits.shape
    num_parts = triton.cdiv(vocab_size, PART)
    padded = triton.next_power_of_2(num_parts)
    number, divides = temperature
    of_scores = (logits, logits.stride(0), vocab_size, num_parts, number)
    grid = (num_parts, batch_size)
    summaries = torch.empty(batch_size, num_parts, 3, dtype=torch.float32, device=logits.device)
    limits = torch.empty(batch_size, 8, dtype=torch.float32, device=logits.device)
    _summarise_parts[grid](*of_scores, summaries, PART=PART, DIVIDES=divides, **EXACT)
    farthest = 0.0 if top_p is None else math.log(vocab_size / (1 - top_p)) + 0.01
    _begin[(batch_size,)](
        summaries, limits, num_parts, top_p or 0.0, min_p or 0.0, farthest, PARTS=padded, HAS_TOP_P=top_p is not None,
        **EXACT,
    )  # fmt: skip
    if top_p is None:
        return Nucleus(limits, None)
    sums = torch.empty(batch_size, num_parts, _FANOUT, dtype=torch.float32, device=logits.device)
    extremes = torch.empty(batch_size, num_parts, 2, dtype=torch.float32, device=logits.device)
    for _ in range(_NUM_PASSES):
        _sum_weights[grid](*of_scores, limits, sums, extremes, PART=PART, DIVIDES=divides, FANOUT=_FANOUT, **EXACT)
        _narrow[(batch_size,)](sums, extremes, limits, num_parts, PARTS=padded, FANOUT=_FANOUT, **EXACT)
    ties = torch.empty(batch_size, num_parts, dtype=torch.int32, device=logits.device)
    _count_ties[grid](*of_scores, limits, ties, PART=PART, DIVIDES=divides, **EXACT)
    return Nucleus(limits, ties)
