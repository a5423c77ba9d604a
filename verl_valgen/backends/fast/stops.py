"""Finds the tokens that complete a stop string in the rows of a batch, several steps at a time.

transformers' criterion looks at the end of a sequence alone; here it is asked about every token since the last look.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import StopStringCriteria

_NO_TOKEN = 2**31 - 1
"""An id that transformers' criterion takes for a token of no stop string."""


class StopStrings:
    """transformers' criterion, and the ends of the prompts, with which a stop string may begin.

    Args:
        criterion: For all rows.
        num_rows: B.
    """

    def __init__(self, criterion: StopStringCriteria, num_rows: int, device: torch.device) -> None:
        self.criterion = criterion
        self.width = criterion.maximum_token_len  # of what the criterion looks at
        self.prompt_ends = torch.full((num_rows, self.width - 1), _NO_TOKEN, dtype=torch.int64, device=device)

    def begin(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Begins answers to prompts in rows."""
        size = self.width - 1
        ends = [([_NO_TOKEN] * size + list(prompt))[len(prompt) :] for prompt in prompts]
        device = self.prompt_ends.device
        values = torch.tensor(ends, dtype=torch.int64, device=device).view(len(rows), size)
        self.prompt_ends.index_copy_(0, torch.tensor(rows, device=device), values)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Moves answers from rows to others."""
        source, target = torch.tensor([sources, targets], device=self.prompt_ends.device)
        self.prompt_ends.index_copy_(0, target, self.prompt_ends.index_select(0, source))

    def lengths(self, output_ids: Tensor, num_new_tokens: Tensor, num_steps: int) -> Tensor:
        """Returns each answer's length with the first of its last tokens that completes a stop string; 0 without one.

        Args:
            output_ids: (B', T) int64 of the first rows.
            num_new_tokens: (B',) int64.
            num_steps: How many of an answer's last tokens are looked at.

        Returns:
            (B',) int64.
        """
        num_rows = len(output_ids)
        steps = torch.arange(1 - num_steps, 1, device=output_ids.device)
        ends = num_new_tokens[:, None] + steps  # (B', N): the lengths of an answer that are looked at
        window = torch.arange(self.width, device=output_ids.device)
        sequences = torch.cat([self.prompt_ends[:num_rows], output_ids], dim=1)
        columns = (ends - 1).clamp(min=0)[:, :, None] + window  # (B', N, width)
        seen = sequences.gather(1, columns.flatten(1)).view(-1, self.width)
        is_stopped = self.criterion(seen, None).view(num_rows, num_steps) & (ends > 0)  # type: ignore[arg-type]
        never = output_ids.shape[1] + 1
        first = torch.where(is_stopped, ends, never).amin(1)
        return torch.where(first == never, 0, first)
