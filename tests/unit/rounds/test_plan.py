"""Which way a round goes, from numbers alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from verl_valgen.records import Request
from verl_valgen.rounds.plan import (
    Needs,
    Plan,
    largest_sequence_bytes,
    logprobs_bytes,
    make_plan,
    sequence_bytes,
    shares,
)

GIB = 2**30
NEEDS = Needs(copy=16 * GIB, unit=2 * GIB, sequence=GIB // 8)


def plan(num_requests: int = 5, free: float = math.inf, world_size: int = 8, **settings) -> Plan:
    defaults = {"gather": "auto", "ranks": "auto", "batch_size": "auto", "why_not_sharded": None}
    return make_plan(num_requests, NEEDS, free, world_size, **(defaults | settings))


def test_more_tokens_than_the_model_has_places_for_need_no_memory():
    config = LlamaConfig(max_position_embeddings=2048)
    requests = [Request([1] * 48, (0, 0), {"max_new_tokens": number}, wants_logprob=True) for number in (2000, 10**9)]
    for takes in (largest_sequence_bytes, logprobs_bytes):
        few, many = (takes([request], config, torch.bfloat16) for request in requests)
        assert 0 < few == many


@pytest.mark.parametrize(
    ("num_requests", "settings", "expected"),
    [
        (5, {}, Plan(False, 1, 32)),
        (63, {}, Plan(False, 1, 32)),
        (64, {}, Plan(False, 2, 32)),
        (512, {}, Plan(False, 8, 64)),
        (64, {"world_size": 1}, Plan(False, 1, 64)),
        (64, {"ranks": 1}, Plan(False, 1, 64)),
        (5, {"ranks": 3}, Plan(False, 3, 32)),
        (5, {"ranks": 99}, Plan(False, 5, 32)),
        (64, {"batch_size": 8}, Plan(False, 8, 8)),
        (64, {"batch_size": 8, "ranks": 2}, Plan(False, 2, 8)),
        (64, {"gather": "sharded"}, Plan(True, 8, 32)),
        (64, {"gather": "sharded", "ranks": 1, "batch_size": 2}, Plan(True, 8, 2)),
    ],
)
def test_with_memory_to_spare(num_requests, settings, expected):
    assert plan(num_requests, **settings) == expected


def test_memory_bounds_the_batch_and_then_the_way():
    assert plan(64, free=21 * GIB, ranks=1) == Plan(False, 1, 7)  # 0.9 of 21 GiB less copy and unit: 0.9 GiB
    assert plan(64, free=20.2 * GIB, ranks=1) == Plan(False, 1, 1)
    assert plan(64, free=20 * GIB, ranks=1) == Plan(True, 8, 32)  # 16 GiB without the copy
    assert plan(64, free=2.4 * GIB) == Plan(True, 8, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs 18.1 GiB on each device that answers, and 1.8 GiB can be had (without a copy: 2.1 GiB)"),
        ({"gather": "copy"}, "needs 18.1 GiB on each device that answers, and 1.8 GiB can be had"),
        ({"gather": "sharded"}, "needs 2.1 GiB on each device that answers, and 1.8 GiB can be had"),
        ({"why_not_sharded": "it is odd"}, "and 1.8 GiB can be had (without a copy: it is odd)"),
    ],
)
def test_where_nothing_fits(settings, message):
    with pytest.raises(MemoryError) as error:
        plan(free=2 * GIB, **settings)
    assert message in str(error.value)


def test_what_cannot_be_done_is_not_tried():
    with pytest.raises(ValueError, match=r"generation\.gather=sharded: it is odd"):
        plan(gather="sharded", why_not_sharded="it is odd")
    assert plan(why_not_sharded="it is odd") == plan()


@given(st.integers(1, 600), st.integers(1, 64))
def test_shares_are_neighbours_in_order_and_even(num_requests, num_ranks):
    num_ranks = min(num_requests, num_ranks)
    parts = shares(num_requests, num_ranks)
    assert [i for part in parts for i in part] == list(range(num_requests))
    sizes = {len(part) for part in parts}
    assert len(parts) == num_ranks
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_a_sequence_takes_at_least_its_keys_and_values():
    import torch

    config = LlamaConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128,
    )  # fmt: skip
    cache = 2 * 3 * 2 * 16 * (10 + 20) * 2
    assert cache < sequence_bytes(config, 10, 20, torch.bfloat16) < cache + 2 * 10 * 1000 + 48 * 101
