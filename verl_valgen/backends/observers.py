"""What is noticed of sequences while they are generated, and `generate` does not tell: where each met something first.

To notice waits for no device; to ask, behind the last token, does. This module knows transformers' `generate`, and no
requests.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria, StopStringCriteria


class FirstMeeting:
    """Remembers the length at which each sequence met something first."""

    met_at: Tensor | None = None  # (B,) int64 length, prompt included; 0: not yet

    def note(self, met: Tensor, length: int) -> None:
        """
        Args:
            met: (B,) bool.
            length: Of all sequences now, in tokens; their prompts, of which there is at least one token, included.
        """
        if self.met_at is None:
            self.met_at = torch.zeros_like(met, dtype=torch.int64)
        self.met_at = torch.where(met & (self.met_at == 0), length, self.met_at)

    def lengths(self, prompt_length: int) -> list[int | None]:
        """Number of new tokens that each sequence had then, None where it met nothing."""
        assert self.met_at is not None, "generate() calls its processors and criteria at least once"
        return [length - prompt_length if length else None for length in self.met_at.tolist()]


class StopStrings(FirstMeeting, StoppingCriteria):
    """transformers' stop strings; a sequence meets one with the token that completes it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: list[str]) -> None:
        self.criteria = StopStringCriteria(tokenizer, stop_strings)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        met = self.criteria(input_ids, scores, **kwargs)  # (B,) bool
        self.note(met, input_ids.shape[1])
        return met


class NanWatch(FirstMeeting, LogitsProcessor):
    """Leaves the scores as they are. To be the last processor, so that NaN that another removes is none.

    Args:
        num_sequences: B. With beams, a sequence meets NaN where one of its beams does.
    """

    def __init__(self, num_sequences: int) -> None:
        self.num_sequences = num_sequences

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.note(has_nan(scores).view(self.num_sequences, -1).any(-1), input_ids.shape[1])
        return scores


def has_nan(scores: Tensor) -> Tensor:
    """(B,) bool, of (B, V) scores: whether there is NaN among them."""
    return scores.amax(-1).isnan()  # in one pass: NaN is its own maximum
