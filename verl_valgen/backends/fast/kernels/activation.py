"""The activation of gated MLPs as one Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Computes silu(gate) * up, rounded after each of the two as by torch's operations.

    Args:
        gate_up: (N, 2 * I), contiguous: gate beside up. float32, float16 or bfloat16.

    Returns:
        (N, I).
    """
    return _activated(gate_up, is_silu=True)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """Computes gelu(gate) * up with the tanh approximation of gelu, otherwise as `silu_and_mul`."""
    return _activated(gate_up, is_silu=False)


def _activated(gate_up: Tensor, is_silu: bool) -> Tensor:
    assert gate_up.is_contiguous()
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(num_tokens, size)
    # Tokens come first: their number has no limit in the first dimension of a grid.
    _activate_and_multiply[num_tokens, triton.cdiv(size, _BLOCK)](
        gate_up, output, size, IS_SILU=is_silu, BLOCK=_BLOCK, num_warps=4
    )
    return output


@triton.jit
def _activate_and_multiply(gate_up, output, size, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a block of one token's numbers."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_at = gate_up + token * 2 * size + at
    gate = tl.load(gate_at, mask=at < size, other=0.0).to(tl.float32)
    up = tl.load(gate_at + size, mask=at < size, other=0.0).to(tl.float32)
    if IS_SILU:
        activated = gate / (1.0 + tl.exp(-gate))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)  # sqrt(2 / pi)
        activated = gate / (1.0 + tl.exp(-2.0 * inner))  # 0.5 * (1 + tanh(x)) = 1 / (1 + exp(-2 * x))
    dtype = output.dtype.element_ty
    product = activated.to(dtype).to(tl.float32) * up
    tl.store(output + token * size + at, product.to(dtype), mask=at < size)
