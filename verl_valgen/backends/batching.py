"""Turns requests into batches. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from verl_valgen.backends.lengths import most_new_tokens, most_positions
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
    use_cache: bool = True
    """False where keys and values of earlier tokens do not stay what they are while the answer grows."""


def even_length(config: PretrainedConfig) -> float:
    """Returns the most tokens of a sequence in which a model's tables stay what they are."""
    return min(most_positions(config), *table_boundaries(config), math.inf)


def group_requests(requests: Sequence[Request], config: PretrainedConfig) -> list[list[Group]]:
    """Splits requests into as few groups as possible. One inner list has the groups that share their parameters.

    Prompts of different lengths are padded, so they are kept apart where a parameter looks at the prompt's tokens (a
    repetition penalty, say) and would take padding for text, and where an answer is so long that a model counts padding
    all the same (`unshifted_length`). Requests are also kept apart by how many tokens can follow: a learned
    position embedding has nothing beyond its last position, and on CUDA an index out of range there ends the process.

    The longest sequence of a batch decides the rotary table of all where tables depend on the length, so that a batch
    stays on one side of such a length. An answer that crosses it is made without a cache, which would hold keys of the
    table before, and beside prompts of its own length alone.
    """
    by_kind: dict[str, dict[tuple[Any, ...], list[int]]] = {}
    boundaries, unshifted = table_boundaries(config), unshifted_length(config)
    for request in requests:  # kinds in the order of their first request
        by_kind.setdefault(kind_of(request), {})
    for i in sorted(range(len(requests)), key=lambda i: len(requests[i].input_ids)):
        request, length = requests[i], len(requests[i].input_ids)
        limit = most_new_tokens(request, config)
        # A loop may read a prompt without its last token.
        side, end_side = (sum(end > boundary for boundary in boundaries) for end in (length - 1, length + limit))
        may_be_padded = (
            request.params.keys() <= UNAFFECTED_BY_PADDING and side == end_side and length + limit <= unshifted
        )
        key = (limit, side == end_side, side, 0 if may_be_padded else length)
        by_kind[kind_of(request)].setdefault(key, []).append(i)
    return [[Group(indices, *key[:2]) for key, indices in kind.items()] for kind in by_kind.values()]


def refilled_groups(requests: Sequence[Request], groups: Sequence[Group], config: PretrainedConfig) -> list[list[int]]:
    """Joins groups for a loop without padding, where each request has a limit of its own: what stays apart are requests
    that need other rotary tables.

    Returns:
        The indices of requests that may run together, equal prompts one after the other; without those whose context is
        full, and those that cannot have a cache.
    """
    boundaries = table_boundaries(config)
    by_side: dict[int, list[int]] = {}
    for group in groups:
        if group.use_cache and group.max_new_tokens > 0:
            for i in group.indices:
                side = sum(len(requests[i].input_ids) > boundary for boundary in boundaries)
                by_side.setdefault(side, []).append(i)
    return [
        sorted(indices, key=lambda i: (len(requests[i].input_ids), requests[i].input_ids))
        for indices in by_side.values()
    ]


def table_boundaries(config: PretrainedConfig) -> list[int]:
    """Returns the lengths beyond which a model uses another rotary table, for all of a sequence's tokens.

    These are longrope's. ("dynamic" tables change beyond `max_position_embeddings`, where `most_new_tokens` ends.)
    """
    text_config: Any = config.get_text_config()
    # From transformers 5 in `rope_parameters`, of the whole model or of each layer type; before that, in two places.
    parameters = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    boundaries = set()
    for rope in by_layer_type or [parameters]:
        if rope.get("rope_type", rope.get("type")) == "longrope":
            attribute = getattr(text_config, "original_max_position_embeddings", None)
            original = rope.get("original_max_position_embeddings") or attribute
            boundaries.add(original or text_config.max_position_embeddings)
    return sorted(boundaries)


def unshifted_length(config: PretrainedConfig) -> float:
    """Returns the most tokens of a sequence for which it does not matter that padding moves them, mask or not.

    In chunked attention it moves the chunks' bounds, and Llama 4 counts padding where it scales the scores by the
    position.
    """
    text_config: Any = config.get_text_config()
    has_chunks = "chunked_attention" in (getattr(text_config, "layer_types", None) or ["chunked_attention"])
    chunk = getattr(text_config, "attention_chunk_size", None) if has_chunks else None
    is_scaled = getattr(text_config, "attn_temperature_tuning", False)
    first_scaled = getattr(text_config, "floor_scale", None) if is_scaled else None
    return min(chunk or math.inf, (first_scaled or math.inf) - 1)


def kind_of(request: Request) -> str:
    """Equal for requests that are answered alike: those of one of `group_requests`' lists."""
    return repr((sorted(request.params.items()), request.wants_logprob))


def as_id_set(token_ids: int | list[int] | None) -> set[int]:
    """Turns a token id field of a `GenerationConfig` (one id, several or none) into a set."""
    return set(as_ids(token_ids))
