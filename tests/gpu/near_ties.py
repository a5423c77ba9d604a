"""When two greedy searches in bfloat16 count as equal.

Kernels sum in different orders, so two tokens whose logits lie within a rounding of each other can change places, and
from there on the texts part for good.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

NUM_TOKENS = 16
MAX_ULP = 2


def bf16_ulp(values: torch.Tensor) -> torch.Tensor:
    """The distance between neighbouring bfloat16 numbers at `values`; 8 bits of significand, one of them implicit."""
    _, exponent = torch.frexp(values.float())
    return torch.ldexp(torch.ones_like(values, dtype=torch.float32), exponent - 8)


@torch.no_grad()
def ulp_below_the_best(model: PreTrainedModel, prompt_ids: list[int], output_ids: list[int]) -> list[float]:
    """How far each of the first tokens' logits is below the plain model's largest one after the same beginning.

    At most `MAX_ULP`: the token counts as the plain model's own.

    Args:
        model: Plain, in bfloat16.
    """
    output_ids = output_ids[:NUM_TOKENS]
    assert output_ids, "not even an end of sequence was generated"
    ids = torch.tensor([prompt_ids + output_ids], device=model.device)
    logits = model(ids).logits[0, len(prompt_ids) - 1 : -1].float()  # (T, V)
    best = logits.max(-1).values
    chosen = logits[torch.arange(len(output_ids)), output_ids]
    return ((best - chosen) / bf16_ulp(best)).tolist()
