"""What the kernels that choose tokens share: temperature, and Gumbel noise, the numbers of `backends.sampling`.

64-bit integers wrap around in Triton as in torch, and logarithms are taken in double precision. (Their last bit may
differ between two math libraries; it is lost when the noise is rounded to float32.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# As signed integers of 64 bits; see `sampling.split_mix_64`.
_GOLDEN_GAMMA, _MIX_1, _MIX_2 = (
    tl.constexpr(constant - 2**64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_MASK_33, _MASK_34, _MASK_37, _MASK_52 = (tl.constexpr(2**num_bits - 1) for num_bits in (33, 34, 37, 52))
_UNIT = tl.constexpr(2.0**-52)

PART = 4096
"""Tokens of a row for one program of a kernel that reads the whole vocabulary."""

EXACT = {"enable_fp_fusion": False}
"""Options of every kernel here: a product and a sum are rounded one after the other, as tensor operations are."""


@triton.jit
def split_mix_64(key, index):
    """See `sampling.split_mix_64`. Both are int64."""
    z = key + (index + 1) * _GOLDEN_GAMMA
    z = (z ^ ((z >> 30) & _MASK_34)) * _MIX_1
    z = (z ^ ((z >> 27) & _MASK_37)) * _MIX_2
    return z ^ ((z >> 31) & _MASK_33)


@triton.jit
def random_words(key, token_ids):
    """The 52 bits, as int64, of which a token's noise is made. `token_ids` are of any integer type."""
    return (split_mix_64(key, token_ids.to(tl.int64)) >> 12) & _MASK_52


@triton.jit
def gumbel_of(words):
    uniform = (words.to(tl.float64) + 0.5) * _UNIT
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def gumbel_noise(key, token_ids):
    """See `sampling.gumbel_noise`."""
    return gumbel_of(random_words(key, token_ids))


@triton.jit
def may_exceed(words, scores, best):
    """Whether a score plus the noise of these words may be larger than `best`; if so, it says so. Needs no logarithm.

    Noise of a uniform u exceeds x only if u > exp(-exp(-x)) >= 1 - exp(-x). `slack` is for rounding, of sums too.
    """
    slack = 1e-3 + 1e-5 * (tl.abs(scores) + tl.abs(best))
    return (words ^ _MASK_52).to(tl.float32) * _UNIT <= tl.exp(scores - best + slack)


@triton.jit
def scaled(logits, temperature, DIVIDES: tl.constexpr):
    """float32 logits after `TemperatureLogitsWarper`, rounded as torch does (see `temperature_argument`)."""
    if DIVIDES:
        return tl.div_rn(logits, temperature)
    return logits * temperature


def temperature_argument(temperature: float | None, device: torch.device) -> tuple[float, bool]:
    """What the kernels are told of a temperature: a number, and whether logits are divided by it (else multiplied).

    On CUDA torch multiplies a tensor by the reciprocal of a number, on CPU it divides.
    """
    if temperature is None:
        return 1.0, False
    if device.type == "cpu":
        return temperature, True
    return float(1 / torch.tensor(temperature, dtype=torch.float32)), False


@triton.jit
def _store_words(keys, words, num_tokens, BLOCK: tl.constexpr):
    row, ids = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(words + row * num_tokens + ids, split_mix_64(tl.load(keys + row), ids.to(tl.int64)), ids < num_tokens)


@triton.jit
def _store_noise(keys, noise, num_tokens, BLOCK: tl.constexpr):
    row, ids = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(noise + row * num_tokens + ids, gumbel_noise(tl.load(keys + row), ids), ids < num_tokens)


def words_and_noise(keys: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """What the kernels make of keys: for tests and measurements.

    Args:
        keys: (B,) int64.
        num_tokens: V.

    Returns:
        (B, V) int64 words of 64 bits, and the (B, V) float32 noise made of them.
    """
    words = torch.empty(len(keys), num_tokens, dtype=torch.int64, device=keys.device)
    noise = torch.empty_like(words, dtype=torch.float32)
    grid = (len(keys), triton.cdiv(num_tokens, 1024))
    _store_words[grid](keys, words, num_tokens, BLOCK=1024, **EXACT)
    _store_noise[grid](keys, noise, num_tokens, BLOCK=1024, **EXACT)
    return words, noise
