"""Seeded sampling without a random state: Gumbel-max over the warped logits, with counter-based noise.

A token is a function of (seed, row, completion, position) and the logits alone, so the text depends neither on batch
size, order and number of ranks nor on what else drew random numbers, and nothing is drawn from torch's generators.
Philox, which needs many operations, makes a 64-bit key of these four numbers; from there on SplitMix64, which needs
few, makes the noise of each token of the vocabulary. Both are integer tensor operations, so CPU and CUDA get the same
bits, and a CUDA graph can hold the second. This module knows neither models nor ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

_MASK32 = 0xFFFFFFFF
# Multipliers and Weyl constants of Philox-4x32 (Salmon et al. 2011, table 2 and section 4.3).
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
# SplitMix64's increment and multipliers, as signed integers of 64 bits.
_GOLDEN_GAMMA, _MIX_1, _MIX_2 = (
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)

# The fields that shape the distribution a token is drawn from, with transformers' class, the parameter of its
# constructor and the test for "has an effect", in the order in which `GenerationMixin._get_logits_processor` applies
# them.
WARPERS: tuple[tuple[str, str, str, Any], ...] = (
    ("temperature", "TemperatureLogitsWarper", "temperature", lambda x: x != 1.0),
    ("top_h", "TopHLogitsWarper", "top_h", lambda x: True),
    ("top_k", "TopKLogitsWarper", "top_k", lambda x: x != 0),
    ("top_p", "TopPLogitsWarper", "top_p", lambda x: x < 1.0),
    ("min_p", "MinPLogitsWarper", "min_p", lambda x: True),
    ("typical_p", "TypicalLogitsWarper", "mass", lambda x: x < 1.0),
    ("epsilon_cutoff", "EpsilonLogitsWarper", "epsilon", lambda x: 0.0 < x < 1.0),
    ("eta_cutoff", "EtaLogitsWarper", "epsilon", lambda x: 0.0 < x < 1.0),
)


def philox_4x32(counter: Sequence[Tensor | int], key: tuple[int, int], num_rounds: int = 10) -> list[Tensor]:
    """Philox-4x32-10, a counter-based random number generator.

    Source: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11.

    Args:
        counter: Four words in [0, 2**32), int64 tensors (broadcast against each other) or ints.
        key: Two words in [0, 2**32).
        num_rounds: Ten, unless a test says otherwise.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    device = next((word.device for word in counter if isinstance(word, Tensor)), None)
    words = [torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter]
    c0, c1, c2, c3 = torch.broadcast_tensors(*words)
    k0, k1 = key
    for _ in range(num_rounds):
        # int64 products wrap around, which leaves all 64 bits as they are in unsigned arithmetic; the arithmetic
        # right shift fills in sign bits, which the mask takes off.
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK32, (k1 + _PHILOX_W[1]) & _MASK32
    return [c0, c1, c2, c3]


def stream_keys(seed: int, rows: Tensor, completions: Tensor, positions: Tensor) -> Tensor:
    """Where the random numbers of a token begin: one block of Philox, 64 bits of it.

    Args:
        seed: In [0, 2**64); the key of the generator.
        rows: int64 in [0, 2**32), on any device; the three are broadcast against each other.
        completions: int64 in [0, 2**32).
        positions: int64; number of tokens generated so far.

    Returns:
        int64 of the broadcast shape, any 64 bits.
    """
    words = philox_4x32((0, positions, rows, completions), (seed & _MASK32, seed >> 32))
    return (words[0] << 32) | words[1]


def split_mix_64(keys: Tensor, index: Tensor) -> Tensor:
    """The `index`-th output of SplitMix64 begun at `keys`: 64 bits in a dozen operations, where Philox takes 140.

    Source: G. L. Steele, D. Lea, C. H. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA'14, figure 17
    (the variant 13 of Stafford's mixing, as in `java.util.SplittableRandom`). Output 0 is the first.

    Args:
        keys: int64, any 64 bits.
        index: int64, broadcast against the keys.

    Returns:
        int64 of the broadcast shape.
    """
    z = keys + (index + 1) * _GOLDEN_GAMMA
    # An arithmetic shift fills in sign bits, which the mask takes off; products wrap around as unsigned ones do.
    z = (z ^ ((z >> 30) & _mask(34))) * _MIX_1
    z = (z ^ ((z >> 27) & _mask(37))) * _MIX_2
    return z ^ ((z >> 31) & _mask(33))


def _mask(num_bits: int) -> int:
    return (1 << num_bits) - 1


def gumbel_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise for tokens of the vocabulary.

    Args:
        keys: int64; see `stream_keys`.
        token_ids: int64, broadcast against the keys.

    Returns:
        float32 of the broadcast shape, in (-4, 37).
    """
    # With more than 52 bits, or in float32, the largest would round to 1.0 and become an infinite Gumbel.
    uniform = ((split_mix_64(keys, token_ids) >> 12) & _mask(52)).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_().float()


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise, so that the argmax of the result is a draw from softmax(scores) (the Gumbel-max trick).

    Source: C. J. Maddison, D. Tarlow, T. Minka, "A* Sampling", NIPS 2014, section 2.

    Args:
        seed: See `stream_keys`.
        keys: (row, completion) of each sequence of the batch, B pairs.
        prompt_length: Length of the padded prompts; the position is counted from there.
        max_new_tokens: T, the positions that will be asked for.
    """

    def __init__(
        self,
        seed: int,
        keys: Sequence[tuple[int, int]],
        prompt_length: int,
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        rows, completions = torch.tensor(list(keys), dtype=torch.int64).unbind(1)  # (B,) each
        positions = torch.arange(max_new_tokens)[:, None]
        self.keys = stream_keys(seed, rows, completions, positions).to(device)  # (T, B)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return perturbed(scores, self.keys[input_ids.shape[1] - self.prompt_length])


def perturbed(scores: Tensor, keys: Tensor) -> Tensor:
    """`scores` plus Gumbel noise.

    Args:
        scores: (B, V) float32.
        keys: (B,) int64; see `stream_keys`.

    Returns:
        (B, V) float32. On CUDA without a synchronisation; on CPU, where every number takes its time, tokens that cannot
        be drawn get no noise.
    """
    if scores.device.type != "cpu":
        return scores + gumbel_noise(keys[:, None], torch.arange(scores.shape[1], device=scores.device))
    sequences, token_ids = torch.nonzero(scores != -math.inf, as_tuple=True)
    return scores.index_put((sequences, token_ids), gumbel_noise(keys[sequences], token_ids), accumulate=True)


def logits_warpers(params: Mapping[str, Any], device: torch.device) -> LogitsProcessorList:
    """transformers' own warpers for the sampling fields in `params`, in transformers' order.

    transformers builds them only for its own sampling loop, which draws from torch's global generator.
    """
    warpers = LogitsProcessorList()
    for name, class_name, argument, has_effect in WARPERS:
        value = params.get(name)
        if value is not None and has_effect(value):
            extra = {"device": device} if name == "eta_cutoff" else {}
            warpers.append(getattr(transformers, class_name)(**{argument: value}, **extra))
    return warpers
