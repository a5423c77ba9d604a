"""Tries a model on a few tokens, against its own forward pass over one sequence: the tokens, and how to compare.

This module knows transformers' models, and of requests the tokens alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from verl_valgen.records import Request

NUM_STEPS = 3
"""Tokens that follow the prompts of a trial, one at a time."""
_LONG, _SHORT = 20, 6  # tokens of the prompts
_COARSE = (torch.float16, torch.bfloat16)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.06, torch.bfloat16: 0.2}
"""The largest relative difference of logits that counts as rounding, see `difference`. (In bfloat16 on CPU the
largest of 119 tiny models was 0.11, with fused modules, and 0.08 without.)"""
_SAME_KERNELS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.02}
"""The same where neither shapes nor kernels differ."""
COARSE_TOLERANCE = 0.5
"""The same for a dtype with few bits, where there are other proofs or a false alarm costs much."""


def model_key(model: Any) -> str:
    """Returns what is equal for models that compute alike, up to their weights."""
    config = model.config
    attention = getattr(config.get_text_config(), "_attn_implementation", None)
    return f"{type(model).__name__} {model.dtype} {attention} {config.to_json_string(use_diff=False)}"


def sequences_for_trial(requests: Sequence[Request], max_length: float) -> list[list[int]]:
    """Makes three sequences of the requests' tokens: a long one, a short one, and another of the long one's length.

    The last `NUM_STEPS` tokens of each follow its prompt.

    Args:
        max_length: The most tokens of a sequence, for a model with a very short context.
    """
    num_long = int(max(2, min(_LONG, max_length - NUM_STEPS)))
    num_short = max(1, num_long * _SHORT // _LONG)
    tokens = list(itertools.islice(itertools.chain.from_iterable(r.input_ids for r in requests), 10 * _LONG)) or [0]
    stream = itertools.cycle(tokens + tokens[::-1])  # there may be less than one sequence
    return [list(itertools.islice(stream, num + NUM_STEPS)) for num in (num_long, num_short, num_long)]


def full_logits(model: Any, sequence: Sequence[int]) -> Tensor:
    """Returns the (1, NUM_STEPS + 1, V) float32 logits behind the prompt and the tokens after it, without a cache."""
    ids = torch.tensor([list(sequence)], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[:, -NUM_STEPS - 1 :].float()


def difference(expected: Tensor, actual: Tensor, dtype: torch.dtype) -> float:
    """Returns how far (B, NUM_STEPS + 1, V) logits are from those expected, relative to them; infinite with NaN.

    What is added to all logits of a position changes nothing and does not count. It is the largest of all positions;
    for models of a dtype with few bits, where a rounding may send a token to other experts, it is what all positions of
    a sequence but one have at least.
    """
    if not bool(actual.isfinite().all()):
        return math.inf
    expected, actual = (logits - logits.mean(-1, keepdim=True) for logits in (expected, actual))
    # A model may give all tokens the same.
    gaps = (expected - actual).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)  # (B, NUM_STEPS + 1)
    return (gaps.kthvalue(2).values if dtype in _COARSE else gaps).max().item()


def tolerance(model: Any) -> float:
    """Returns the largest `difference` that counts as rounding."""
    in_tf32 = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return _TOLERANCE[torch.float16 if model.dtype == torch.float32 and in_tf32 else model.dtype]


def coarse_tolerance(model: Any) -> float:
    """Returns the same where there are other proofs, or where a false alarm costs much."""
    return max(tolerance(model), COARSE_TOLERANCE) if model.dtype in _COARSE else tolerance(model)


def same_kernels_tolerance(model: Any) -> float:
    """Returns the same between two runs of one way, of which the second differs in what must not matter."""
    return _SAME_KERNELS_TOLERANCE[model.dtype]
