"""Which requests run together. Pure functions on lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PretrainedConfig

from verl_valgen.records import Request
from verl_valgen.settings.generation_config import SAMPLING_ONLY

BLIND_TO_PADDING = SAMPLING_ONLY | {
    *("do_sample", "max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "early_stopping"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "max_time", "use_cache", "cache_implementation"),
    *("suppress_tokens", "renormalize_logits", "remove_invalid_values"),
}
"""Parameters under which padding, which the attention mask hides, changes nothing. Of others that is not known."""


class Group(NamedTuple):
    """Requests that may run together, by their indices, the shortest prompts first."""

    indices: list[int]
    max_new_tokens: int
    """0 where the prompt fills the model's context."""


def most_new_tokens(request: Request, config: PretrainedConfig) -> int:
    """That can follow the prompt within the model's context; 0 where the prompt fills it."""
    max_positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    return int(max(0, min(request.params["max_new_tokens"], max_positions - len(request.input_ids))))


def groups(requests: Sequence[Request], config: PretrainedConfig) -> list[list[Group]]:
    """All requests, in as few groups as may be; in one list those that have the same parameters.

    Of equal length where parameters are set that look at the prompt's tokens (a repetition penalty, say), for these
    take the padding for text.

    A learned position embedding has nothing beyond its last position (on CUDA an index out of range there ends the
    process), so a request's own prompt bounds what can follow.
    """
    found: dict[str, dict[tuple[int, int], list[int]]] = {}
    for request in requests:  # in the order of their first
        found.setdefault(_kind(request), {})
    for i in sorted(range(len(requests)), key=lambda i: len(requests[i].input_ids)):
        request, length = requests[i], len(requests[i].input_ids)
        limit = most_new_tokens(request, config)
        takes_padding = request.params.keys() <= BLIND_TO_PADDING
        found[_kind(request)].setdefault((limit, 0 if takes_padding else length), []).append(i)
    return [[Group(indices, limit) for (limit, _), indices in alike.items()] for alike in found.values()]


def _kind(request: Request) -> str:
    return repr((sorted(request.params.items()), request.wants_logprob))
