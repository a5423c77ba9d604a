"""Attention of one token per row to what the rows of a cache hold, registered with transformers under an own name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from verl_valgen.backends.fast.cache import RowCache
from verl_valgen.backends.fast.kernels import are_available
from verl_valgen.patching import patched

_NAME, _NAME_FOR_PROMPTS = "verl_valgen_decoding", "verl_valgen_prompts"


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


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes what transformers' "sdpa" does, for prompts without a mask by FlashAttention where it can be had.

    Torch would choose cuDNN's, which builds a plan for each new shape: some 40 ms on an H200 where the computation
    takes less than one. Which it chooses is a switch of the whole process, so that it is not asked.

    Args:
        module: transformers passes the attention module.
        query: (N, num_heads, S, D).
        key: (N, num_key_value_heads, S, D).
        value: Likewise.
        attention_mask: None, where each token sees those before it.
        scaling: Factor of the scores; None for 1 / sqrt(D).

    Returns:
        (N, S, num_heads, D), and None for the weights.
    """
    head_dim = query.shape[-1]
    can_be_flash = (
        attention_mask is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_dim == value.shape[-1] <= 256
        and head_dim % 8 == 0
        and getattr(module, "is_causal", True)
        and has_flash(query.device)
    )
    if not can_be_flash:
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, 0.0, True, scale=scaling)[0].transpose(1, 2), None


def has_flash(device: torch.device) -> bool:
    """Whether torch was built with FlashAttention, and a device can run it: from compute capability 8.0 on."""
    return (
        device.type == "cuda"
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@contextmanager
def attention_for_prompts(model: PreTrainedModel) -> Iterator[None]:
    """Makes a model use `causal_attention`, if its own is torch's, for prompts that are padded on the right alone.

    transformers builds no mask for an attention that it does not know.
    """
    config: Any = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(_NAME_FOR_PROMPTS, causal_attention)
    with patched(config, "_attn_implementation", _NAME_FOR_PROMPTS):
        yield


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
