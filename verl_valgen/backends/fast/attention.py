"""Attention of one token per row to what the rows of a cache hold, registered with transformers under an own name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from verl_valgen.backends.fast.cache import RowCache
from verl_valgen.backends.fast.kernels import are_available
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
    """Computes attention of one token per sequence, without a copy of keys and values for every query head.

    The query heads that share a key/value head are passed to torch as if they were the tokens of one sequence, so that
    keys and values are read as they lie; transformers repeats them for every head.

    Args:
        module: Not used; transformers passes the attention module.
        query: (B, num_heads, 1, D).
        key: (B, num_key_value_heads, L, D).
        value: (B, num_key_value_heads, L, D).
        attention_mask: (B, 1, 1, L) in the query's dtype, added to the scores.
        scaling: Factor of the scores; None for 1 / sqrt(D).

    Returns:
        (B, 1, num_heads, D), and None for the weights.
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


def attention_by_kernel(cache: RowCache) -> Callable[..., tuple[Tensor, None]]:
    """Returns what computes the same with a kernel that reads of a row what it holds, and no mask."""
    from verl_valgen.backends.fast.kernels.attention import decode_attention

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = decode_attention(query[:, :, 0], key, value, cache.slots, scale)  # (B, num_heads, D)
        return output[:, None], None

    return attend


@contextmanager
def attention_for_decoding(model: PreTrainedModel, cache: RowCache) -> Iterator[None]:
    """Makes a model's steps use the attention of this module, if theirs is torch's; leaves it alone otherwise."""
    config: Any = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        yield
        return
    has_kernels = model.device.type == "cuda" and are_available(model.device)
    AttentionInterface.register(_NAME, attention_by_kernel(cache) if has_kernels else grouped_attention)
    try:
        with patched(config, "_attn_implementation", _NAME):
            yield
    finally:
        AttentionInterface.register(_NAME, grouped_attention)  # the other one would keep the cache
