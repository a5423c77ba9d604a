"""RMS norm as one Triton kernel, alone and together with the addition before it.

torch's is one kernel too, but takes three times as long for few tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes states / sqrt(mean(states ** 2) + eps) * weight, in float32 and rounded once, as `torch.nn.RMSNorm`.

    Args:
        states: (N, D), contiguous. float32, float16 or bfloat16.
        weight: (D,), in the same dtype.

    Returns:
        (N, D).
    """
    assert states.is_contiguous()
    output = torch.empty_like(states)
    _launch(states, states, weight, states, output, eps, adds=False)
    return output


def add_and_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Computes residual + delta, rounded as by torch's addition, and `rms_norm` of that.

    Args:
        residual: (N, D), contiguous. float32, float16 or bfloat16.
        delta: (N, D), contiguous, in the same dtype.
        weight: (D,), in the same dtype.

    Returns:
        The sum, and its norm: (N, D) each.
    """
    assert residual.is_contiguous()
    assert delta.is_contiguous()
    assert residual.shape == delta.shape
    total, output = torch.empty_like(residual), torch.empty_like(residual)
    _launch(residual, delta, weight, total, output, eps, adds=True)
    return total, output


def _launch(
    states: Tensor, delta: Tensor, weight: Tensor, total: Tensor, output: Tensor, eps: float, *, adds: bool
) -> None:
    num_tokens, size = states.shape
    block = triton.next_power_of_2(size)
    _normalize[(num_tokens,)](
        states, delta, weight, total, output, size, eps,
        ADDS=adds, BLOCK=block, num_warps=max(1, min(16, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _normalize(states, delta, weight, total, output, size, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one token. Without an addition `delta` and `total` are not used."""
    first = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    numbers = tl.load(states + first + at, mask=at < size, other=0.0).to(tl.float32)
    weights = tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(delta + first + at, mask=at < size, other=0.0).to(tl.float32)
        rounded = (numbers + added).to(total.dtype.element_ty)
        tl.store(total + first + at, rounded, mask=at < size)
        numbers = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers, 0) / size + eps)
    tl.store(output + first + at, (numbers * scale * weights).to(output.dtype.element_ty), mask=at < size)
