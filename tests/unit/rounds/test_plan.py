"""Which way a round goes, from numbers alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_valgen.rounds.plan import BATCHES, ROWS, Needs, Plan, make_plan, shares

GIB = 2**30
NEEDS = Needs(copy=16 * GIB, unit=2 * GIB, sequence=GIB // 8)
WITH_ROWS = replace(NEEDS, row=GIB // 16, prompts=GIB)


def plan(
    num_requests: int = 5, free: float = math.inf, world_size: int = 8, needs: Needs = NEEDS, **settings: object
) -> Plan:
    defaults = {"gather": "auto", "ranks": "auto", "batch_size": "auto", "why_not_sharded": None}
    return make_plan(num_requests, needs, free, world_size, **(defaults | settings))


@pytest.mark.parametrize(
    ("num_requests", "settings", "expected"),
    [
        (5, {}, Plan(False, 1, 32)),
        (63, {}, Plan(False, 1, 63)),
        (64, {}, Plan(False, 2, 32)),
        (300, {}, Plan(False, 7, 43)),
        (512, {}, Plan(False, 8, 64)),
        (10000, {}, Plan(False, 8, 64)),
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


@pytest.mark.parametrize(
    ("num_requests", "settings", "expected"),
    [
        (5, {}, Plan(False, 1, 64)),
        (127, {}, Plan(False, 1, 127)),
        (128, {}, Plan(False, 2, 64)),
        (300, {}, Plan(False, 4, 75)),
        (1024, {"world_size": 1}, Plan(False, 1, 256)),
        (1024, {"ranks": 2}, Plan(False, 2, 256)),
        (1024, {}, Plan(False, 8, 128)),
        (10000, {}, Plan(False, 8, 256)),
        (1024, {"batch_size": 300, "world_size": 1}, Plan(False, 1, 300)),
        (1024, {"batch_size": 512}, Plan(False, 2, 512)),
        (1024, {"gather": "sharded"}, Plan(True, 8, 64)),
    ],
)
def test_rows_that_are_refilled(num_requests, settings, expected):
    assert plan(num_requests, needs=WITH_ROWS, **settings) == expected


def test_memory_bounds_the_batch_and_then_the_way():
    assert plan(64, free=21 * GIB, ranks=1) == Plan(False, 1, 7)  # 0.9 of 21 GiB less copy and unit: 0.9 GiB
    assert plan(64, free=20.2 * GIB, ranks=1) == Plan(False, 1, 1)
    assert plan(64, free=20 * GIB, ranks=1) == Plan(True, 8, 32)  # 16 GiB without the copy
    assert plan(64, free=2.4 * GIB) == Plan(True, 8, 1)


def test_memory_bounds_the_rows_and_what_fills_them_has_its_own():
    # 0.9 of it less copy, unit and prompts is for rows.
    assert plan(1024, (19 + 10) / 0.9 * GIB, 1, WITH_ROWS) == Plan(False, 1, 160)
    assert plan(1024, (19 + 1.01) / 0.9 * GIB, 8, WITH_ROWS) == Plan(False, 8, 16)
    assert plan(1024, (19 + 1 / 15) / 0.9 * GIB, 1, WITH_ROWS) == Plan(False, 1, 1)
    # Through the sharded model nothing is refilled.
    assert plan(1024, 18.9 / 0.9 * GIB, 8, WITH_ROWS) == Plan(True, 8, 64)
    with pytest.raises(MemoryError, match=r"needs 19\.1 GiB"):
        plan(1024, 18.9 / 0.9 * GIB, 8, WITH_ROWS, gather="copy")


@given(
    num_requests=st.integers(1, 5000),
    world_size=st.integers(1, 16),
    num_that_fit=st.floats(1, 600),
    needs=st.sampled_from([NEEDS, WITH_ROWS]),
)
def test_auto_leaves_no_rank_idle_and_no_bound_behind(num_requests, world_size, num_that_fit, needs):
    sequence, bounds = (needs.sequence, BATCHES) if needs.row is None else (needs.row, ROWS)
    free = (needs.copy + needs.unit + needs.prompts + num_that_fit * sequence) / 0.9
    chosen = plan(num_requests, free, world_size, needs)
    assert not chosen.is_sharded
    assert 1 <= chosen.num_ranks <= min(world_size, num_requests)
    assert 1 <= chosen.batch_size <= min(bounds.most, num_that_fit + 1e-6)
    # Each has a full share, and answers it at once where it may.
    share = math.ceil(num_requests / chosen.num_ranks)
    assert chosen.num_ranks == 1 or num_requests // chosen.num_ranks >= min(bounds.full, chosen.batch_size)
    assert chosen.batch_size >= min(share, bounds.most, int(num_that_fit - 1e-6))


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
