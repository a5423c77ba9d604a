"""Which requests run together. Pure functions on lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from verl_valgen.hf_parameters import SAMPLING_ONLY
from verl_valgen.samples import Request

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


def groups(requests: Sequence[Request], params: Mapping[str, Any], config: PretrainedConfig) -> list[Group]:
    """All requests, in as few groups as may be.

    Of equal length where parameters are set that look at the prompt's tokens (a repetition penalty, say), for these
    take the padding for text.

    A learned position embedding has nothing beyond its last position (on CUDA an index out of range there ends the
    process), so a request's own prompt bounds what can follow.
    """
    max_positions = getattr(config.get_text_config(), "max_position_embeddings", None) or float("inf")
    takes_padding = params.keys() <= BLIND_TO_PADDING
    found: dict[tuple[int, int], list[int]] = {}
    for i in sorted(range(len(requests)), key=lambda i: len(requests[i].input_ids)):
        length = len(requests[i].input_ids)
        limit = int(max(0, min(params["max_new_tokens"], max_positions - length)))
        found.setdefault((limit, 0 if takes_padding else length), []).append(i)
    return [Group(indices, limit) for (limit, _), indices in found.items()]
