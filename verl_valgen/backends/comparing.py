"""Compares the logits of two readers of one text: do they have the same model?

Two computations of one model differ by rounding, at all positions alike; so what is asked is by how much half of the
positions differ, and nine of ten. One position alone may be off by any amount, where rounding sends its token to
another expert. The figures behind the bounds come from benchmarks/links.py (docs/verification.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_RULED_OUT = 1e3
"""So far below the largest a logit is no prediction: the model allows the token nowhere."""


class Closeness(NamedTuple):
    """How far two readings of one model may differ, as `gaps` tells."""

    half: float
    """By more than this, half of the positions at most,"""
    most: float
    """and by more than this one in ten."""


EXACT = Closeness(5e-4, 1e-3)
"""Where both computed in float32: they differ by less than a ten thousandth."""
ROUNDED = Closeness(0.06, 0.15)
"""Where one of the two rounds to fewer bits."""
ROUTED = Closeness(0.35, 0.7)
"""The same for a mixture of experts, whose tokens rounding sends to other experts."""


def closeness(dtypes: Iterable[torch.dtype], has_experts: bool, device: torch.device) -> Closeness:
    """What to expect of two computations of one model.

    Args:
        dtypes: That they compute in.
        has_experts: Whether the model has a mixture of experts.
        device: Where they compute: CUDA's matrix products may take float32 for fewer bits.
    """
    in_tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    if set(dtypes) <= {torch.float32, torch.float64} and not in_tf32:
        return EXACT
    return ROUTED if has_experts else ROUNDED


def gaps(expected: Tensor, actual: Tensor) -> Tensor:
    """How far (N, V) logits are from those expected, relative to them, by position.

    What is added to all logits of a position changes nothing and does not count, and neither do tokens that the model
    rules out.

    Returns:
        (N,) float32; infinite where one of the two has numbers and the other has not, 0 where neither has.
    """
    expected, actual = expected.float(), actual.float()
    largest = [logits.amax(-1, keepdim=True) for logits in (expected, actual)]  # NaN where there is any
    counts = (expected > largest[0] - _RULED_OUT) | (actual > largest[1] - _RULED_OUT)  # (N, V)
    number = counts.sum(-1, keepdim=True).clamp(min=1)
    centred = []
    for logits in (expected, actual):
        logits = logits.where(counts, 0.0)
        centred.append((logits - logits.sum(-1, keepdim=True) / number).where(counts, 0.0))
    # A model may give all tokens the same.
    found = (centred[0] - centred[1]).norm(dim=-1) / centred[0].norm(dim=-1).clamp(min=1e-6)
    is_expected, is_actual = (value[:, 0].isfinite() for value in largest)
    found = torch.where(is_actual & is_expected, found, torch.where(is_actual | is_expected, math.inf, 0.0))
    return found.nan_to_num(math.inf, math.inf)


def dissimilarity(gaps: Tensor, allowed: Closeness) -> str | None:
    """Why two readings are not of one model, in words with numbers; None where they are.

    Args:
        gaps: (N,) as the function of that name gives them, N > 0.
    """
    in_order = gaps.sort().values.tolist()
    half, most = in_order[len(in_order) // 2], in_order[min(len(in_order) - 1, len(in_order) * 9 // 10)]
    if half <= allowed.half and most <= allowed.most:
        return None
    return (
        f"at half of {len(in_order)} positions its logits differ by {half:.2g}, at one in ten by {most:.2g} "
        f"(rounding gives {allowed.half:g} and {allowed.most:g} at most)"
    )
