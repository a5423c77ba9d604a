"""Records the length at which each sequence first produced a stop string or NaN, which `generate()` does not report.

Recording stays on the device; `lengths()` copies to the host. This module knows transformers' `generate`, and no
requests.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria, StopStringCriteria

from verl_valgen.backends.memory import as_list


class FirstOccurrence:
    """Remembers how long each sequence was when something first occurred in it."""

    first_lengths: Tensor | None = None
    """(B,) int64 in tokens, prompt included; 0 where it has not occurred yet."""

    def record(self, occurred: Tensor, length: int) -> None:
        """Notes the sequences in which it occurs now. Waits for no device.

        Args:
            occurred: (B,) bool.
            length: Current length of all sequences in tokens, prompts included; at least 1.
        """
        if self.first_lengths is None:
            self.first_lengths = torch.zeros_like(occurred, dtype=torch.int64)
        self.first_lengths = torch.where(occurred & (self.first_lengths == 0), length, self.first_lengths)

    def lengths(self, prompt_length: int) -> list[int | None]:
        """Returns each sequence's number of new tokens at the first occurrence, None without one. Waits for the device.

        Args:
            prompt_length: Length of the padded prompts.
        """
        assert self.first_lengths is not None, "generate() calls its processors and criteria at least once"
        return [length - prompt_length if length else None for length in as_list(self.first_lengths)]


class StopStringObserver(FirstOccurrence, StoppingCriteria):
    """Stops sequences at transformers' stop strings; one occurs with the token that completes it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: list[str]) -> None:
        self.criteria = StopStringCriteria(tokenizer, stop_strings)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        is_stopped = self.criteria(input_ids, scores, **kwargs)  # (B,) bool
        self.record(is_stopped, input_ids.shape[1])
        return is_stopped


class NanObserver(FirstOccurrence, LogitsProcessor):
    """Looks for NaN among the scores and leaves them as they are.

    To be the last processor, so that NaN that another one removes does not count.

    Args:
        num_sequences: B. Beams of one sequence count together.
    """

    def __init__(self, num_sequences: int) -> None:
        self.num_sequences = num_sequences

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.record(has_nan(scores).view(self.num_sequences, -1).any(-1), input_ids.shape[1])
        return scores


def has_nan(scores: Tensor) -> Tensor:
    """Tells which rows of (B, V) scores contain NaN, as (B,) bool."""
    return scores.amax(-1).isnan()  # in one pass: NaN is its own maximum
