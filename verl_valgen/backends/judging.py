"""Judges an answer by the logits of another reader: would it have chosen these tokens?

Two computations of the same model choose the same tokens up to rounding, so the question is by how much the reader's
logits would have to be other than they are. This module knows logits, parameters and noise; it knows neither models nor
ranks. The figures behind the rule come from benchmarks/verification.py (docs/verification.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from verl_valgen.backends.sampling import gumbel_noise, logits_warpers, perturbed, stream_keys
from verl_valgen.records import Request

_LARGEST = 1e4
"""In place of infinity, for which JSON has no word."""
_CHUNK_NUMBERS = 2**22
"""Logits that are judged at once."""
_RULED_OUT = 1e3
"""So far below the largest a logit is no prediction: the model allows the token nowhere."""
_DOUBT = 0.03
"""Logits are scaled by 1 +- this, and probabilities to be reached changed by as much, for tokens at the edge of top-p
and its like: on either side they may be chosen."""
_CHANGES_BEFORE_WARPERS = {"repetition_penalty", "bad_words_ids", "min_new_tokens"}
"""Parameters that change scores before the warpers: without them nobody can tell what these have left."""
_MASSES, _SMALLEST_MASS = ("top_p", "typical_p"), 1e-6


def shortfalls(
    logits: Tensor, request: Request, output_ids: Sequence[int], seed: int, processors: LogitsProcessorList
) -> Tensor:
    """How far each token of an answer lies below what the reader would have chosen.

    For a greedy answer that is the distance of the token's logit from the largest. A sampled one is compared after the
    same warpers and the same noise. There a token outside of what the warpers leave is judged by how far it lies below
    the last one inside; and a rival that the noise prefers counts by how far it is from being outside, or from being
    beaten, whichever is less.

    Args:
        logits: (T, V) of any dtype, the reader's at the positions before the answer's tokens.
        request: What was asked.
        output_ids: The answer, T tokens.
        seed: See `sampling.stream_keys`.
        processors: What transformers makes of the request's other parameters, warpers excluded.

    Returns:
        (T,) float32 on the logits' device, >= 0, in units of the spread of the position's logits: their standard
        deviation over the vocabulary.
    """
    chosen = torch.tensor(output_ids, device=logits.device)
    num_rows = max(1, _CHUNK_NUMBERS // logits.shape[1])
    parts = []
    for begin in range(0, len(output_ids), num_rows):
        rows = slice(begin, begin + num_rows)
        raw = logits[rows].float()
        scores = processed(raw, begin, request, output_ids, processors)
        if request.params["do_sample"]:
            positions = torch.arange(begin, begin + len(raw))
            row, completion = (torch.tensor(number) for number in request.key)
            keys = stream_keys(seed, row, completion, positions).to(logits.device)
            missing = _missing_of_sample(scores, chosen[rows], keys, request)
        else:
            missing = scores.amax(-1) - _at(scores, chosen[rows])
        parts.append((missing / _spread(raw)).nan_to_num(_LARGEST, _LARGEST).clamp(0, _LARGEST))
    return torch.cat(parts)


def logprob_gaps(logits: Tensor, request: Request, output_ids: Sequence[int], own: Sequence[float]) -> Tensor:
    """How far the log-probabilities that a backend gives the tokens of an answer are from the reader's.

    For sampled answers whose noise is the backend's own: any token could have been drawn, so what is asked is whether
    the backend draws from the reader's distribution. A token outside of what the warpers leave is judged by how far it
    lies below the last one inside, too.

    Args:
        logits: (T, V) of any dtype, the reader's at the positions before the answer's tokens.
        request: What was asked.
        output_ids: The answer, T tokens.
        own: The backend's T log-probabilities before any logits processor, in nats.

    Returns:
        (T,) float32 on the logits' device, >= 0, in units of the spread of the position's logits.
    """
    chosen, given = torch.tensor(output_ids, device=logits.device), torch.tensor(own, device=logits.device)
    num_rows = max(1, _CHUNK_NUMBERS // logits.shape[1])
    parts = []
    for begin in range(0, len(output_ids), num_rows):
        rows = slice(begin, begin + num_rows)
        raw = logits[rows].float()
        gap = (_at(raw.log_softmax(-1), chosen[rows]) - given[rows]).abs()
        if not request.params.keys() & _CHANGES_BEFORE_WARPERS:
            gap = torch.maximum(gap, _missing_inside(raw, chosen[rows], request))
        parts.append((gap / _spread(raw)).nan_to_num(_LARGEST, _LARGEST).clamp(0, _LARGEST))
    return torch.cat(parts)


class Tolerance(NamedTuple):
    """How far the tokens of a right answer may lie below what the reader would have chosen."""

    far: float
    """A shortfall beyond this counts against an answer."""
    num_tokens: int
    """So many tokens may be as far off in any answer,"""
    share: float
    """and this share of the tokens besides."""


EXACT = Tolerance(0.02, 1, 0.02)
"""Where both computed in float32: they differ by a millionth."""
ROUNDED = Tolerance(0.15, 1, 0.03)
"""Where one of the two rounds to 16 bits."""
ROUTED = Tolerance(0.7, 2, 0.15)
"""The same for a mixture of experts. A rounding error can send a token to another expert, which changes its logits at
once, and those of tokens that attend to it: untrained, they are off by as much as in a wrong answer, but not often."""


def tolerance(dtypes: Iterable[torch.dtype], has_experts: bool) -> Tolerance:
    """What to expect of two computations.

    Args:
        dtypes: In which answer and reader were computed.
        has_experts: Whether the model has a mixture of experts.
    """
    if set(dtypes) <= {torch.float32, torch.float64}:
        return EXACT
    return ROUTED if has_experts else ROUNDED


def objection(
    shortfalls: Tensor, tolerance: Tolerance = ROUNDED, what: str = "lie below what the trainer's model would choose"
) -> str | None:
    """Why an answer is not what the reader's model says, if it isn't.

    Tokens are counted, not summed up: right answers have few that are far off, and one may be off by any amount.

    Args:
        shortfalls: (T,) as the function of that name, or `logprob_gaps`, gives them.
        tolerance: See the function of that name.
        what: What is wrong with tokens that are far off.

    Returns:
        None where the answer is plausible; else a phrase with numbers.
    """
    num_far = int((shortfalls > tolerance.far).sum())
    if num_far <= tolerance.num_tokens + tolerance.share * len(shortfalls):
        return None
    return (
        f"{num_far} of {len(shortfalls)} tokens {what}, by up to {float(shortfalls.max()):.2g} times the spread of its "
        "logits"
    )


def processed(
    logits: Tensor, begin: int, request: Request, output_ids: Sequence[int], processors: LogitsProcessorList
) -> Tensor:
    """The logits of some positions after processors that look at the tokens before; `begin` is the first position."""
    if not processors:
        return logits
    process: Any = processors  # annotated with types that tensors do not have
    ids = torch.tensor([[*request.input_ids, *output_ids]], device=logits.device)
    lengths = range(len(request.input_ids) + begin, len(request.input_ids) + begin + len(logits))
    return torch.cat([process(ids[:, :length], row[None].clone()) for length, row in zip(lengths, logits, strict=True)])


def _missing_of_sample(scores: Tensor, chosen: Tensor, keys: Tensor, request: Request) -> Tensor:
    """(N,): by how much logits, before the temperature, must change for the tokens to be drawn from (N, V) scores."""
    temperature = request.params.get("temperature") or 1.0
    perhaps, surely = _left_by_warpers(scores, chosen, request)
    scores = scores / temperature
    last_inside, from_inside = _from_inside(scores, chosen, perhaps)
    own = _at(scores, chosen)
    rivals = perturbed(scores.masked_fill(~surely, -math.inf), keys)  # (N, V)
    ahead = rivals - (own + gumbel_noise(keys, chosen))[:, None]
    from_first = torch.minimum(ahead, scores - last_inside[:, None]).masked_fill(~surely, -math.inf).amax(-1)
    return torch.maximum(from_inside, from_first) * temperature


def _missing_inside(scores: Tensor, chosen: Tensor, request: Request) -> Tensor:
    """(N,): by how much logits must change for the tokens to be among those that the warpers leave of (N, V) scores."""
    perhaps, _ = _left_by_warpers(scores, chosen, request)
    return _from_inside(scores, chosen, perhaps)[1]


def _left_by_warpers(scores: Tensor, chosen: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """(N, V) each: which tokens the warpers leave perhaps, and which surely."""
    params = request.params

    def is_left(doubt: float) -> Tensor:
        masses = {name: params[name] + doubt for name in _MASSES if (params.get(name) or 1.0) < 1.0}
        masses = {name: min(max(mass, _SMALLEST_MASS), 1.0) for name, mass in masses.items()}
        warp: Any = logits_warpers({**params, **masses}, scores.device)
        return warp(chosen[:, None], scores * (1 - doubt)) > -math.inf

    left = [is_left(doubt) for doubt in (_DOUBT, 0.0, -_DOUBT)]
    return left[0] | left[1] | left[2], left[0] & left[1] & left[2]


def _from_inside(scores: Tensor, chosen: Tensor, is_inside: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) each: the last score inside, and how far the chosen tokens' lie below it, 0 inside."""
    last_inside = scores.masked_fill(~is_inside, math.inf).amin(-1)
    return last_inside, torch.where(_at(is_inside, chosen), 0.0, last_inside - _at(scores, chosen))


def _spread(logits: Tensor) -> Tensor:
    """(N,): the standard deviation of (N, V) logits, without those by which a model rules tokens out."""
    counts = logits > logits.amax(-1, keepdim=True) - _RULED_OUT
    number = counts.sum(-1)
    mean = logits.where(counts, 0.0).sum(-1) / number
    squares = (logits - mean[:, None]).where(counts, 0.0).square().sum(-1)
    return (squares / (number - 1).clamp(min=1)).sqrt().clamp(min=1e-6)


def logprobs(logits: Tensor, output_ids: Sequence[int]) -> Tensor:
    """(T,) float32: ln p(token) of an answer's T tokens under (T, V) logits of the positions before them."""
    chosen = torch.tensor(output_ids, device=logits.device)
    num_rows = max(1, _CHUNK_NUMBERS // logits.shape[1])
    chunks = zip(logits.split(num_rows), chosen.split(num_rows), strict=True)
    return torch.cat([_at(rows.float().log_softmax(-1), tokens) for rows, tokens in chunks])


def _at(values: Tensor, chosen: Tensor) -> Tensor:
    return values.gather(1, chosen[:, None])[:, 0]
