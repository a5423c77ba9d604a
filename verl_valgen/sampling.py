"""Seeded sampling without a random state: Gumbel-max over the warped logits, with counter-based noise.

A token is a function of (seed, row, completion, position) and the logits alone, so the text depends neither on batch
size, order and number of ranks nor on what else drew random numbers, and nothing is drawn from torch's generators.
Everything is integer tensor operations on the logits' device, so CPU and CUDA get the same bits, and a CUDA graph can
hold it. This module knows neither models nor ranks.
"""

from __future__ import annotations

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
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(word, dtype=torch.int64) for word in counter))
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


def gumbel_noise(seed: int, rows: Tensor, completions: Tensor, position: Tensor | int, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for one token of each sequence.

    Args:
        seed: In [0, 2**64); the key of the generator.
        rows: (B,) int64 on any device, in [0, 2**32).
        completions: (B,) int64, in [0, 2**32).
        position: Number of tokens generated so far; an int or a tensor of shape () or (B,).
        vocab_size: V.

    Returns:
        (B, V) float32 on the device of `rows`, in (-4, 23).
    """
    num_blocks = (vocab_size + 3) // 4  # a block of the generator gives four words
    blocks = torch.arange(num_blocks, device=rows.device)
    position = torch.as_tensor(position, device=rows.device).reshape(-1, 1)
    counter = (blocks[None, :], position, rows[:, None], completions[:, None])
    words = torch.stack(philox_4x32(counter, (seed & _MASK32, seed >> 32)), dim=-1)  # (B, num_blocks, 4)
    words = words.flatten(1)[:, :vocab_size]
    # In float32 the largest words would round to a uniform of 1.0 and an infinite Gumbel: float64 keeps it in (0, 1).
    uniform = (words.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform)).float()


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise, so that the argmax of the result is a draw from softmax(scores) (the Gumbel-max trick).

    Source: C. J. Maddison, D. Tarlow, T. Minka, "A* Sampling", NIPS 2014, section 2.

    Args:
        seed: See `gumbel_noise`.
        keys: (row, completion) of each sequence of the batch, B pairs.
        prompt_length: Length of the padded prompts; the position is counted from there.
    """

    def __init__(self, seed: int, keys: Sequence[tuple[int, int]], prompt_length: int, device: torch.device) -> None:
        self.seed = seed
        self.rows, self.completions = torch.tensor(list(keys), dtype=torch.int64, device=device).unbind(1)  # (B,) each
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        noise = gumbel_noise(self.seed, self.rows, self.completions, position, scores.shape[1])
        return scores + noise  # (B, V)


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
