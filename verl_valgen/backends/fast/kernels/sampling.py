"""Chooses the next tokens of (B, V) logits by kernels: temperature, top-k, top-p, min-p, noise and argmax.

Waits for no device, and a CUDA graph can hold it. This module knows no processors; choice.py has the same as tensor
operations, which say what is right.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from verl_valgen.backends.fast.kernels.sampling_best import best_tokens
from verl_valgen.backends.fast.kernels.sampling_candidates import MAX_CANDIDATES, best_candidate, largest_logits
from verl_valgen.backends.fast.kernels.sampling_noise import temperature_argument
from verl_valgen.backends.fast.kernels.sampling_nucleus import find_nucleus


class Warping(NamedTuple):
    """What is done to the logits, in this order. None: nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    """In [0, 1)."""
    min_p: float | None = None
    has_noise: bool = False


def can_choose(logits: Tensor, num_candidates: int | None) -> bool:
    """Whether the kernels serve logits of this shape and type, with so many candidates for top-k."""
    is_served = logits.dtype in (torch.float32, torch.bfloat16, torch.float16) and logits.shape[1] < 2**24
    return is_served and len(logits) > 0 and (num_candidates is None or num_candidates <= MAX_CANDIDATES)


def choose(
    logits: Tensor, noise_keys: Tensor | None, warping: Warping, num_candidates: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Chooses one token per row.

    Args:
        logits: (B, V), see `can_choose`.
        noise_keys: (B,) int64; read where `warping.has_noise`.
        num_candidates: C < V, of how many tokens top-k chooses; more than k, as what ties with the k-th is kept. None
            without top-k.

    Returns:
        The (B,) int64 tokens; (B,) bool, whether NaN is among the logits; (B,) bool, whether more tokens tie with the
        k-th than were looked at, None without top-k.
    """
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    noise_keys = noise_keys.contiguous() if noise_keys is not None and warping.has_noise else None
    temperature = temperature_argument(warping.temperature, logits.device)
    if warping.top_k is not None:
        assert num_candidates is not None
        values, token_ids = largest_logits(logits, num_candidates)
        return best_candidate(values, token_ids, noise_keys, temperature, warping.top_k, warping.top_p, warping.min_p)
    limits = ties = None
    if warping.top_p is not None or warping.min_p is not None:
        limits, ties = find_nucleus(logits, temperature, warping.top_p, warping.min_p)
    return *best_tokens(logits, noise_keys, temperature, limits, ties), None
