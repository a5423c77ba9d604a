"""How long sequences may get, and how many there are at once. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from verl_valgen.records import Request

MOST_PROMPT_TOKENS = 4096
"""The most tokens, padding included, of prompts that are read at once to fill rows, but for a longer prompt."""
MOST_IN_A_BATCH = 64
"""So many sequences at once that run until the longest answer has ended; more gain little, for their memory."""
ROW_MULTIPLE = 64
"""The number of tokens that a row has room for is a multiple of this."""


def most_new_tokens(request: Request, config: PretrainedConfig) -> int:
    """Returns how many tokens can follow a prompt: `max_new_tokens`, as far as the model's context reaches.

    Args:
        config: The model's. Without `max_position_embeddings` its context has no end.
    """
    return int(max(0, min(request.params["max_new_tokens"], most_positions(config) - len(request.input_ids))))


def most_positions(config: PretrainedConfig) -> float:
    """Returns the most tokens of a sequence, infinite where the configuration names no end."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def longest_sequence(requests: Sequence[Request], config: PretrainedConfig) -> int:
    """Returns the tokens of the longest prompt with its answer, of at least one request."""
    return max(len(request.input_ids) + most_new_tokens(request, config) for request in requests)
