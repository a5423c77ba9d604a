"""Attention of one new token per row to the row's own tokens in a long cache, as Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, scaling: float, num_splits: int | None = None
) -> Tensor:
    """Computes softmax(scaling * query . keys) . values for every row, over the slots 0..slots[b] of row b.

    What lies in later slots is not read, so it may be anything. Scores, softmax and sums are float32; weights are
    rounded to the values' dtype before they are multiplied.

    In calls with the same shapes (B, H, Hkv, L, D) the result of a row depends, bit for bit, on that row alone: on its
    query, its keys and values and its slot, not on where in the batch it stands or on the other rows. With another B or
    L it is the same up to rounding: the number of parts that a row is cut into, so that few rows use the whole device,
    follows from the shapes, as a CUDA graph holds it.

    Args:
        query: (B, H, D), H a multiple of Hkv. float32, float16 or bfloat16, as keys and values.
        keys: (B, Hkv, L, D), of any strides but for the last, which is 1: a view of a larger cache will do.
        values: (B, Hkv, L, DV), likewise.
        slots: (B,) int64, each from 0 to L - 1: where the last token that a row attends to lies. Larger ones count as
            L - 1.
        scaling: Factor of the scores.
        num_splits: Number of parts of a row; None for what suits the shapes.

    Returns:
        (B, H, DV), contiguous, in the query's dtype.
    """
    batch_size, num_heads, head_dim = query.shape
    num_kv_heads, cache_length, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    if query.stride(2) != 1:
        query = query.contiguous()
    assert keys.stride(3) == values.stride(3) == 1, "a head's numbers must lie side by side"
    padded_dim, padded_value_dim = (max(16, triton.next_power_of_2(size)) for size in (head_dim, value_dim))
    num_multiprocessors, shared_bytes = _multiprocessors(query.device)
    block, num_stages = _block(max(padded_dim, padded_value_dim) * query.element_size(), shared_bytes)
    if num_splits is None:
        num_splits = _num_splits(batch_size * num_kv_heads, -(-cache_length // block), num_multiprocessors)
    output = query.new_empty(batch_size, num_heads, value_dim)
    if num_splits == 1:
        parts, part_stats = output, output  # not used
    else:
        parts = query.new_empty(batch_size, num_heads, num_splits, value_dim, dtype=torch.float32)
        part_stats = query.new_empty(batch_size, num_heads, num_splits, 2, dtype=torch.float32)
    _attend[num_kv_heads, batch_size, num_splits](
        query, keys, values, slots, output, parts, part_stats,
        scaling * _LOG2_E, cache_length, num_splits,
        query.stride(0), query.stride(1), *keys.stride()[:3], *values.stride()[:3],
        NUM_GROUPS=num_heads // num_kv_heads,
        PADDED_GROUPS=max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim, VALUE_DIM=value_dim, PADDED_VALUE_DIM=padded_value_dim,
        BLOCK=block, IS_SPLIT=num_splits > 1, num_warps=4, num_stages=num_stages,
    )  # fmt: skip
    if num_splits > 1:
        _combine[num_heads, batch_size](
            parts, part_stats, output, num_splits,
            VALUE_DIM=value_dim, PADDED_VALUE_DIM=padded_value_dim,
            PADDED_SPLITS=triton.next_power_of_2(num_splits), num_warps=4,
        )  # fmt: skip
    return output


def _block(bytes_per_slot: int, shared_bytes: int) -> tuple[int, int]:
    """Returns how many slots are read at once, and how many such blocks are under way.

    Args:
        bytes_per_slot: Of a padded key or value.
        shared_bytes: The device's memory for a program. An H100's has room for all that is best there.
    """
    block = 64 if bytes_per_slot <= 256 else 32 if bytes_per_slot <= 512 else 16
    num_stages = 3
    while num_stages > 1 and num_stages * block * 2 * bytes_per_slot > 0.8 * shared_bytes:
        num_stages -= 1
    return block, num_stages


def _num_splits(num_rows: int, num_blocks: int, num_multiprocessors: int) -> int:
    """Returns into how many parts a row is cut.

    Args:
        num_rows: Of keys: sequences times key/value heads.
        num_blocks: The most that a row has.
    """
    return max(1, min(2 * num_multiprocessors // num_rows, num_blocks // 2, 32))


def _multiprocessors(device: torch.device) -> tuple[int, int]:
    """Returns the number of a device's multiprocessors, and the bytes of memory that a program on one may share."""
    if device.type != "cuda":
        return 132, 232_448  # an H100's, for the interpreter
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 49_152)


@triton.jit
def _attend(
    query, keys, values, slots, output, parts, part_stats,
    scaling, cache_length, num_splits,
    query_row, query_head, key_row, key_head, key_slot, value_row, value_head, value_slot,
    NUM_GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """One program: a part of a row, one key/value head and the query heads that share it.

    Stores the output, or of a part the sum of its weighted values, the largest score and the sum of the weights.
    """
    kv_head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.minimum(tl.load(slots + row) + 1, cache_length).to(tl.int32)
    part = tl.cdiv(tl.cdiv(length, BLOCK), num_splits) * BLOCK  # slots
    first, last = split * part, tl.minimum(split * part + part, length)
    groups, dims, value_dims = tl.arange(0, PADDED_GROUPS), tl.arange(0, PADDED_DIM), tl.arange(0, PADDED_VALUE_DIM)
    heads = kv_head * NUM_GROUPS + groups
    is_group, is_dim, is_value_dim = groups < NUM_GROUPS, dims < HEAD_DIM, value_dims < VALUE_DIM
    query_block = tl.load(
        query + row * query_row + heads[:, None] * query_head + dims[None, :],
        mask=is_group[:, None] & is_dim[None, :],
        other=0.0,
    )
    keys += row * key_row + kv_head.to(tl.int64) * key_head
    values += row * value_row + kv_head.to(tl.int64) * value_head
    largest = tl.full([PADDED_GROUPS], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUPS], tl.float32)
    result = tl.zeros([PADDED_GROUPS, PADDED_VALUE_DIM], tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_held = at < last
        key = tl.load(
            keys + at[:, None].to(tl.int64) * key_slot + dims[None, :],
            mask=is_held[:, None] & is_dim[None, :],
            other=0.0,
        )
        value = tl.load(
            values + at[:, None].to(tl.int64) * value_slot + value_dims[None, :],
            mask=is_held[:, None] & is_value_dim[None, :],
            other=0.0,
        )
        # inductor passes the factor as float64
        scores = (tl.dot(query_block, tl.trans(key), input_precision="ieee") * scaling).to(tl.float32)
        scores = tl.where(is_held[None, :], scores, float("-inf"))
        now_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - now_largest[:, None])
        shrink = tl.exp2(largest - now_largest)
        total = total * shrink + tl.sum(weights, 1)
        result = tl.dot(weights.to(value.dtype), value, result * shrink[:, None], input_precision="ieee")
        largest = now_largest
    is_stored = is_group[:, None] & is_value_dim[None, :]
    if IS_SPLIT:
        at_part = (row * tl.num_programs(0) * NUM_GROUPS + heads) * num_splits + split
        tl.store(parts + at_part[:, None] * VALUE_DIM + value_dims[None, :], result, mask=is_stored)
        tl.store(part_stats + at_part * 2, largest, mask=is_group)
        tl.store(part_stats + at_part * 2 + 1, total, mask=is_group)
    else:
        at_head = row * tl.num_programs(0) * NUM_GROUPS + heads
        tl.store(
            output + at_head[:, None] * VALUE_DIM + value_dims[None, :],
            (result / total[:, None]).to(output.dtype.element_ty),
            mask=is_stored,
        )


@triton.jit
def _combine(
    parts, part_stats, output, num_splits,
    VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: one query head of a row, put together from its parts, some of which may be empty."""
    at_head = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    splits, dims = tl.arange(0, PADDED_SPLITS), tl.arange(0, PADDED_VALUE_DIM)
    is_split, is_dim = splits < num_splits, dims < VALUE_DIM
    at_part = at_head * num_splits + splits
    largest = tl.load(part_stats + at_part * 2, mask=is_split, other=float("-inf"))
    total = tl.load(part_stats + at_part * 2 + 1, mask=is_split, other=0.0)
    results = tl.load(
        parts + at_part[:, None] * VALUE_DIM + dims[None, :], mask=is_split[:, None] & is_dim[None, :], other=0.0
    )
    weights = tl.exp2(largest - tl.max(largest, 0))
    result = tl.sum(results * weights[:, None], 0) / tl.sum(total * weights, 0)
    tl.store(output + at_head * VALUE_DIM + dims, result.to(output.dtype.element_ty), mask=is_dim)
