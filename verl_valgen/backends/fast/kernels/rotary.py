"""Rotation of one new token's queries and keys, and the writing of keys and values into the cache, as one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8
"""Heads that one program treats."""


def rotate_and_store(
    states: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    num_heads: int,
    norm_weights: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 0.0,
) -> Tensor:
    """Turns queries and keys by their position, and writes keys and values into slot slots[b] of each row b.

    The first R numbers of a head are turned, x * cos + rotate_half(x) * sin, the others stay. Every product and sum is
    rounded as by torch's operations, so that the result is the same bit for bit.

    Args:
        states: (B, (H + 2 * Hkv) * D): the heads of the queries, then the keys' and the values'. float32, float16 or
            bfloat16, as `cos`, `sin`, `keys` and `values`.
        cos: (B, R), R <= D and even, of any strides.
        sin: (B, R), likewise.
        keys: (B, Hkv, L, D), written in place; of any strides but for the last, which is 1.
        values: (B, Hkv, L, D), likewise.
        slots: (B,) int64. For a slot that is not within 0..L - 1 nothing is written.
        num_heads: H.
        norm_weights: (D,) each, the weights of RMS norms that come before, of queries and of keys (computed in float32
            and rounded once, as by `torch.nn.RMSNorm`); None for no norms.
        norm_eps: Of the norms.

    Returns:
        The rotated queries, (B, H, D), contiguous.
    """
    batch_size, num_kv_heads, cache_length, head_dim = keys.shape
    size = cos.shape[1]
    assert states.stride(1) == keys.stride(3) == values.stride(3) == 1, "a head's numbers must lie side by side"
    queries = states.new_empty(batch_size, num_heads, head_dim)
    query_weight, key_weight = norm_weights or (states, states)  # not used without norms
    _rotate_and_store[batch_size, triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS)](
        states, cos, sin, queries, keys, values, slots, query_weight, key_weight,
        norm_eps, cache_length, states.stride(0), *cos.stride(), *sin.stride(),
        *keys.stride()[:3], *values.stride()[:3],
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        HALF=size // 2, PADDED_HALF=triton.next_power_of_2(size // 2),
        REST=head_dim - size, PADDED_REST=triton.next_power_of_2(max(1, head_dim - size)),
        HAS_NORMS=norm_weights is not None, HEADS=_HEADS,
        num_warps=4, enable_fp_fusion=False,  # torch's products are rounded before they are added
    )  # fmt: skip
    return queries


@triton.jit
def _rotate_and_store(
    states, cos, sin, queries, keys, values, slots, query_weight, key_weight,
    norm_eps, cache_length, state_row, cos_row, cos_dim, sin_row, sin_dim,
    key_row, key_head, key_slot, value_row, value_head, value_slot,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, PADDED_HALF: tl.constexpr, REST: tl.constexpr, PADDED_REST: tl.constexpr,
    HAS_NORMS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program: some heads of a row, in three parts: the halves that turn and the rest."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_query, is_value = heads < NUM_HEADS, heads >= NUM_HEADS + NUM_KV_HEADS
    is_head = heads < NUM_HEADS + 2 * NUM_KV_HEADS
    slot = tl.load(slots + row)
    is_written = is_head & (is_query | ((slot >= 0) & (slot < cache_length)))
    kv_heads = (heads - tl.where(is_value, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS)).to(tl.int64)
    query_at = queries + (row * NUM_HEADS + heads) * HEAD_DIM
    key_at = keys + row * key_row + kv_heads * key_head + slot * key_slot
    value_at = values + row * value_row + kv_heads * value_head + slot * value_slot
    target = tl.where(is_query, query_at, tl.where(is_value, value_at, key_at))[:, None]
    source = (states + row * state_row + heads * HEAD_DIM)[:, None]

    dims, rest_dims = tl.arange(0, PADDED_HALF), tl.arange(0, PADDED_REST)
    is_dim, is_rest = dims < HALF, rest_dims < REST
    mask, rest_mask = is_head[:, None] & is_dim[None, :], is_head[:, None] & is_rest[None, :]
    first = tl.load(source + dims[None, :], mask=mask, other=0.0)
    second = tl.load(source + HALF + dims[None, :], mask=mask, other=0.0)
    rest = tl.load(source + 2 * HALF + rest_dims[None, :], mask=rest_mask, other=0.0)
    if HAS_NORMS:
        squares = _squares(first) + _squares(second) + _squares(rest)
        scale = tl.where(is_value, 1.0, tl.rsqrt(squares / HEAD_DIM + norm_eps))[:, None]
        first = _normed(first, scale, query_weight, key_weight, dims, is_dim, is_query, is_value)
        second = _normed(second, scale, query_weight, key_weight, HALF + dims, is_dim, is_query, is_value)
        rest = _normed(rest, scale, query_weight, key_weight, 2 * HALF + rest_dims, is_rest, is_query, is_value)
    cos_at, sin_at = cos + row * cos_row + dims * cos_dim, sin + row * sin_row + dims * sin_dim
    first_cos = tl.load(cos_at, mask=is_dim, other=0.0)[None, :]
    second_cos = tl.load(cos_at + HALF * cos_dim, mask=is_dim, other=0.0)[None, :]
    first_sin = tl.load(sin_at, mask=is_dim, other=0.0)[None, :]
    second_sin = tl.load(sin_at + HALF * sin_dim, mask=is_dim, other=0.0)[None, :]
    turned_first = _product(first, first_cos) - _product(second, first_sin)
    turned_second = _product(second, second_cos) + _product(first, second_sin)
    first = tl.where(is_value[:, None], first, turned_first.to(first.dtype))
    second = tl.where(is_value[:, None], second, turned_second.to(second.dtype))
    tl.store(target + dims[None, :], first, mask=is_written[:, None] & is_dim[None, :])
    tl.store(target + HALF + dims[None, :], second, mask=is_written[:, None] & is_dim[None, :])
    tl.store(target + 2 * HALF + rest_dims[None, :], rest, mask=is_written[:, None] & is_rest[None, :])


@triton.jit
def _product(a, b):
    """Returns a product that is rounded to the dtype of `a`, as float32."""
    return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype).to(tl.float32)


@triton.jit
def _squares(part):
    return tl.sum(part.to(tl.float32) * part.to(tl.float32), 1)


@triton.jit
def _normed(part, scale, query_weight, key_weight, dims, is_dim, is_query, is_value):
    """Multiplies heads by their scales and by the weights of queries or keys; values stay."""
    of_query = tl.load(query_weight + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    of_key = tl.load(key_weight + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    weight = tl.where(is_query[:, None], of_query, tl.where(is_value[:, None], 1.0, of_key))
    return (part.to(tl.float32) * scale * weight).to(part.dtype)
