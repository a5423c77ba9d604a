"""Turns requests into batches. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from verl_valgen.settings.generation_config import SAMPLING_ONLY, as_ids

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from verl_valgen.records import Request

UNAFFECTED_BY_PADDING = SAMPLING_ONLY | {
    *("do_sample", "max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "early_stopping"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "max_time", "use_cache", "cache_implementation"),
    *("suppress_tokens", "renormalize_logits", "remove_invalid_values"),
}
"""Parameters under which padding that the attention mask hides changes nothing. With any other it may."""


class Group(NamedTuple):
    """Requests that may run together, by their indices, the shortest prompts first."""

    indices: list[int]
    max_new_tokens: int
    """0 where the prompt fills the model's context."""


def most_new_tokens(request: Request, config: PretrainedConfig) -> int:
    """Returns how many tokens can follow a prompt: `max_new_tokens`, as far as the model's context reaches.

    Args:
        config: The model's. Without `max_position_embeddings` its context has no end.
    """
    max_positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    return int(max(0, min(request.params["max_new_tokens"], max_positions - len(request.input_ids))))


def group_requests(requests: Sequence[Request], config: PretrainedConfig) -> list[list[Group]]:
    """Splits requests into as few groups as possible. One inner list has the groups that share their parameters.

    Prompts of different lengths are padded, so they are kept apart where a parameter looks at the prompt's tokens (a
    repetition penalty, say) and would take padding for text. Requests are also kept apart by how many tokens can
    follow: a learned position embedding has nothing beyond its last position, and on CUDA an index out of range there
    ends the process.
    """
    by_kind: dict[str, dict[tuple[int, int], list[int]]] = {}
    for request in requests:  # kinds in the order of their first request
        by_kind.setdefault(_kind(request), {})
    for i in sorted(range(len(requests)), key=lambda i: len(requests[i].input_ids)):
        request, length = requests[i], len(requests[i].input_ids)
        limit = most_new_tokens(request, config)
        may_be_padded = request.params.keys() <= UNAFFECTED_BY_PADDING
        by_kind[_kind(request)].setdefault((limit, 0 if may_be_padded else length), []).append(i)
    return [[Group(indices, limit) for (limit, _), indices in kind.items()] for kind in by_kind.values()]


def _kind(request: Request) -> str:
    """Equal for requests with equal parameters."""
    return repr((sorted(request.params.items()), request.wants_logprob))


def left_pad(sequences: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pads token ids on the left with id 0; returns them and the attention mask that hides it, (B, L) int64 each."""
    length = max(len(ids) for ids in sequences)
    input_ids = torch.tensor([[0] * (length - len(ids)) + ids for ids in sequences], device=device)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
    return input_ids, mask


def as_id_set(token_ids: int | list[int] | None) -> set[int]:
    """Turns a token id field of a `GenerationConfig` (one id, several or none) into a set."""
    return set(as_ids(token_ids))
