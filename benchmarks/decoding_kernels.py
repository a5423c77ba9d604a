"""Measures the Triton kernels of a decoding step beside torch's operations, on one GPU.

    python benchmarks/decoding_kernels.py

Heads and sizes of Qwen2.5-7B, bfloat16. Every figure is the median of nine replays of a CUDA graph that holds the
operation many times, on different data where that would stay in the L2 cache. Attention: rows of equal length (three
quarters of the cache), and of uneven ones (prompts of 60 to 200 tokens and parts of answers of geometric length, mean
150), with the bytes per second of keys and values that rows hold; a copy's are those that it reads and writes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from verl_valgen.backends.fast.kernels.activation import silu_and_mul
from verl_valgen.backends.fast.kernels.attention import decode_attention
from verl_valgen.backends.fast.kernels.norm import rms_norm
from verl_valgen.backends.fast.kernels.rotary import rotate_and_store

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN_SIZE, INTERMEDIATE_SIZE = 28, 4, 128, 3584, 18944
SCALING = HEAD_DIM**-0.5
BEYOND_L2_BYTES = 200_000_000
SHAPES = (
    ("equal", 8, 256), ("equal", 8, 2048), ("equal", 8, 8192), ("equal", 64, 256), ("equal", 64, 2048),
    ("equal", 256, 256), ("uneven", 8, 768), ("uneven", 64, 768), ("uneven", 256, 768),
)  # fmt: skip


@torch.no_grad()
def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    measure_copy()
    for kind, num_rows, cache_length in SHAPES:
        measure_attention(kind, num_rows, cache_length)
    for num_rows in (8, 64, 256):
        measure_rotation(num_rows)
        measure_activation(num_rows)
        measure_norm(num_rows)


def measure_copy() -> None:
    source, target = random(2, 1 << 29)
    us = timed([lambda: target.copy_(source)] * 4)
    print(f"copy: {2 * source.nbytes / us / 1e3:.0f} GB/s")


def measure_attention(kind: str, num_rows: int, cache_length: int) -> None:
    slots = lengths(kind, num_rows, cache_length)
    held_bytes = int((slots + 1).sum()) * NUM_KV_HEADS * HEAD_DIM * 4
    num_caches = max(3, min(40, BEYOND_L2_BYTES // held_bytes))
    caches = [random(2, num_rows, NUM_KV_HEADS, cache_length, HEAD_DIM) for _ in range(num_caches)]
    query = random(num_rows, NUM_HEADS, HEAD_DIM)
    grouped = query.unflatten(1, (NUM_KV_HEADS, -1))
    is_held = torch.arange(cache_length, device="cuda") <= slots[:, None]
    mask = torch.zeros(is_held.shape, device="cuda", dtype=query.dtype).masked_fill(~is_held, -torch.inf)
    mask = mask[:, None, None].expand(-1, NUM_KV_HEADS, grouped.shape[2], -1)
    torchs = timed(
        [
            lambda keys=keys, values=values: F.scaled_dot_product_attention(grouped, keys, values, mask, scale=SCALING)
            for keys, values in caches
        ]
    )
    ours = timed(
        [
            lambda keys=keys, values=values: decode_attention(query, keys, values, slots, SCALING)
            for keys, values in caches
        ]
    )
    report(f"attention, {kind} rows, L = {cache_length}", num_rows, torchs, ours, held_bytes)


def measure_rotation(num_rows: int) -> None:
    states = [random(num_rows, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM) for _ in range(20)]
    cos, sin = random(2, num_rows, HEAD_DIM)
    keys, values = random(2, num_rows, NUM_KV_HEADS, 768, HEAD_DIM)
    slots, rows = torch.full((num_rows,), 300, device="cuda"), torch.arange(num_rows, device="cuda")

    def by_torch(states: Tensor) -> Tensor:
        query_key, value = states.unflatten(1, (-1, HEAD_DIM)).split([NUM_HEADS + NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
        first, second = query_key.chunk(2, dim=-1)
        query_key = query_key * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
        keys[rows, :, slots], values[rows, :, slots] = query_key[:, NUM_HEADS:], value
        return query_key[:, :NUM_HEADS]

    torchs = timed([lambda x=x: by_torch(x) for x in states])
    ours = timed([lambda x=x: rotate_and_store(x, cos, sin, keys, values, slots, NUM_HEADS) for x in states])
    report("rotation and cache", num_rows, torchs, ours)


def measure_activation(num_rows: int) -> None:
    inputs = [random(num_rows, 2 * INTERMEDIATE_SIZE) for _ in range(20)]
    torchs = timed([lambda x=x: F.silu(x[:, :INTERMEDIATE_SIZE]) * x[:, INTERMEDIATE_SIZE:] for x in inputs])
    report("silu and product", num_rows, torchs, timed([lambda x=x: silu_and_mul(x) for x in inputs]))


def measure_norm(num_rows: int) -> None:
    states, weight = random(num_rows, HIDDEN_SIZE), random(HIDDEN_SIZE)
    torchs = timed([lambda: F.rms_norm(states, (HIDDEN_SIZE,), weight, 1e-6)] * 20)
    report("RMS norm", num_rows, torchs, timed([lambda: rms_norm(states, weight, 1e-6)] * 20))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def lengths(kind: str, num_rows: int, cache_length: int) -> Tensor:
    """Returns the last slot of each row, (B,)."""
    generator = torch.Generator().manual_seed(0)
    if kind == "equal":
        slots = torch.full((num_rows,), cache_length * 3 // 4 - 1)
    else:
        answers = torch.empty(num_rows).exponential_(1 / 150, generator=generator).clamp(max=512)
        written = answers * torch.rand(num_rows, generator=generator)
        slots = torch.randint(60, 200, (num_rows,), generator=generator) + written.long()
    return slots.to("cuda")


def timed(calls: Sequence[Callable[[], object]]) -> float:
    """Returns microseconds per call."""
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) / len(calls) * 1e3


def report(what: str, num_rows: int, torchs: float, ours: float, num_bytes: int | None = None) -> None:
    rates = "" if num_bytes is None else f", {num_bytes / torchs / 1e3:.0f} and {num_bytes / ours / 1e3:.0f} GB/s"
    print(f"{num_rows:4} rows  {what}: torch {torchs:.1f} us, kernel {ours:.1f} us{rates}", flush=True)


if __name__ == "__main__":
    main()
