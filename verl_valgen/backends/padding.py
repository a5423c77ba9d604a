"""Prompts of different lengths in one batch: what pads them, and which may be together. Pure functions."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from verl_valgen.records import Request


class Sharing(enum.IntEnum):
    """Which prompts may share a batch, for a model: from all to none, and not even a cache."""

    ANY_LENGTHS = 0
    EQUAL_LENGTHS = 1
    NONE = 2
    NOT_EVEN_A_CACHE = 3
    """transformers' own cache gives other answers than the model's forward pass."""


def next_batch(requests: Sequence[Request], indices: list[int], batch_size: int, sharing: Sharing) -> list[int]:
    """Returns the first of a group's indices, as many as may share a batch."""
    batch = indices[: 1 if sharing >= Sharing.NONE else batch_size]
    if sharing is Sharing.EQUAL_LENGTHS:
        batch = [i for i in batch if len(requests[i].input_ids) == len(requests[batch[0]].input_ids)]
    return batch


def left_pad(sequences: Sequence[list[int]], device: torch.device, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Pads token ids on the left; returns them and the attention mask that hides it, (B, L) int64 each."""
    length = max(len(ids) for ids in sequences)
    input_ids = torch.tensor([[pad_id] * (length - len(ids)) + ids for ids in sequences], device=device)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
    return input_ids, mask
