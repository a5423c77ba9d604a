"""Attention of single tokens to a long cache, under a name that transformers' models find it by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from verl_valgen.patching import patched

_NAME = "verl_valgen_decoding"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one token to the cache. The query heads that share a key/value head take the place of the tokens of
    one sequence, so that keys and values are read as they are: transformers copies them for every head.

    Args:
        query: (B, num_heads, 1, D).
        key: (B, num_key_value_heads, L, D), and value.
        attention_mask: (B, 1, 1, L) in the query's dtype, added to the scores.

    Returns:
        (B, 1, num_heads, D), and no weights.
    """
    batch_size, num_heads, _, head_dim = query.shape
    num_groups = num_heads // key.shape[1]
    output = F.scaled_dot_product_attention(
        query.reshape(batch_size, key.shape[1], num_groups, head_dim),
        key,
        value,
        attn_mask=attention_mask.expand(-1, key.shape[1], num_groups, -1),
        scale=scaling,
    )  # (B, num_key_value_heads, num_groups, D)
    return output.reshape(batch_size, 1, num_heads, value.shape[-1]), None


@contextmanager
def attention_for_decoding(model: PreTrainedModel) -> Iterator[None]:
    """While it is open, a model with torch's attention has `grouped_attention`."""
    config: Any = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(_NAME, grouped_attention)
    with patched(config, "_attn_implementation", _NAME):
        yield
