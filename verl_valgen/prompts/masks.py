"""Where in one row of tokens the answer lies, told by its masks. Pure functions; they know no data set."""

from __future__ import annotations

from typing import Any

import torch


def without_padding(input_ids: Any, attention_mask: Any, loss_mask: Any) -> tuple[list[int], list[bool] | None]:
    """One row's tokens and loss mask, each (length,), where the attention mask, if there is one, is set.

    Raises:
        ValueError: A mask is not as long as the tokens.
    """
    ids = torch.as_tensor(input_ids).flatten()
    for name, mask in (("attention_mask", attention_mask), ("loss_mask", loss_mask)):
        if mask is not None and (length := torch.as_tensor(mask).numel()) != len(ids):
            raise ValueError(f"`{name}` must be as long as `input_ids`, which has {len(ids)} tokens, got {length}")
    real = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask).flatten()
    mask = None if loss_mask is None else torch.as_tensor(loss_mask).flatten()[real.bool()].bool().tolist()
    return ids[real.bool()].tolist(), mask


def answer_spans(mask: list[bool] | None, num_tokens: int, shifted: bool) -> list[tuple[int, int]]:
    """Start and end of each answer: the runs of ones, in order; [] where there is none."""
    spans, end = [], 0
    while mask and True in mask[end:]:
        start = mask.index(True, end)
        end = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
        spans.append((min(start + shifted, num_tokens), min(end + shifted, num_tokens)))
    return spans


def end_of_last(needle: list[int], ids: list[int]) -> int:
    """Where the last occurrence of `needle` in `ids` ends; `len(ids)` if there is none."""
    starts = range(len(ids) - len(needle), -1, -1)
    return next((i + len(needle) for i in starts if ids[i : i + len(needle)] == needle), len(ids))
