"""Where in one row of tokens the answer lies, told by its masks. Pure functions; they know no data set."""

from __future__ import annotations

from typing import Any

import torch


def without_padding(input_ids: Any, attention_mask: Any, loss_mask: Any) -> tuple[list[int], list[bool] | None]:
    """One row's tokens and loss mask, each (length,), where the attention mask, if there is one, is set."""
    ids = torch.as_tensor(input_ids).flatten()
    real = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask).flatten()
    mask = None if loss_mask is None else torch.as_tensor(loss_mask).flatten()[real.bool()].bool().tolist()
    return ids[real.bool()].tolist(), mask


def answer_span(mask: list[bool] | None, num_tokens: int, shifted: bool) -> tuple[int, int]:
    """Start and end of the answer: the last run of ones; (num_tokens, num_tokens) where there is none."""
    if not mask or not any(mask):
        return num_tokens, num_tokens
    end = num_tokens - mask[::-1].index(True)
    start = end - [*mask[:end][::-1], False].index(False)
    return min(start + shifted, num_tokens), min(end + shifted, num_tokens)


def end_of_last(needle: list[int], ids: list[int]) -> int:
    """Where the last occurrence of `needle` in `ids` ends; `len(ids)` if there is none."""
    starts = range(len(ids) - len(needle), -1, -1)
    return next((i + len(needle) for i in starts if ids[i : i + len(needle)] == needle), len(ids))
