"""How many ranks hold the weights of an engine of others together, and which they are, from numbers alone."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_valgen.rounds.plan import ROWS, EngineNeeds, Plan, make_engine_plan

GIB = 2**30
NEEDS = EngineNeeds(
    weights=16 * GIB, unit=GIB, sequence={n: GIB // (8 * n) for n in (1, 2, 4, 8)}, fixed=4 * GIB, fixed_if_kept=GIB
)  # fmt: skip


def plan(
    num_requests: int = 5, free: float = math.inf, world_size: int = 8, needs: EngineNeeds = NEEDS, **settings: object
) -> Plan:
    """With room for so much besides what is left alone, a tenth."""
    defaults = {"tensor_parallel": "auto", "ranks": "auto", "batch_size": "auto"}
    return make_engine_plan(num_requests, needs, free / 0.9, world_size, **(defaults | settings))


def takes(ranks_per_copy: int, num_sequences: float = 0, needs: EngineNeeds = NEEDS) -> float:
    sequences = num_sequences * needs.sequence[ranks_per_copy]
    return needs.weights / ranks_per_copy + needs.unit + needs.fixed + sequences


@pytest.mark.parametrize(
    ("num_requests", "settings", "expected"),
    [
        (5, {}, Plan(False, 1, 64)),
        (127, {}, Plan(False, 1, 127)),
        (128, {}, Plan(False, 2, 64)),
        (10000, {}, Plan(False, 8, 256)),
        (1024, {"batch_size": 300, "world_size": 1, "needs": replace(NEEDS, sequence={1: 1})}, Plan(False, 1, 300)),
        (5, {"tensor_parallel": 2}, Plan(False, 2, 64, 2)),
        (1024, {"tensor_parallel": 2}, Plan(False, 8, 256, 2)),
        (1024, {"tensor_parallel": 8}, Plan(False, 8, 256, 8)),
        (300, {"tensor_parallel": 2}, Plan(False, 8, 75, 2)),
        (300, {"tensor_parallel": 2, "ranks": 5}, Plan(False, 4, 150, 2)),  # the fifth has no other half
        (300, {"tensor_parallel": 4, "ranks": 1}, Plan(False, 4, 256, 4)),  # fewer cannot hold a copy
        (5, {"ranks": 3}, Plan(False, 3, 64)),
        (5, {"ranks": 99}, Plan(False, 5, 64)),
        (3, {"tensor_parallel": 2, "ranks": 8}, Plan(False, 6, 64, 2)),
    ],
)
def test_with_memory_to_spare(num_requests, settings, expected):
    assert plan(num_requests, **settings) == expected


def test_an_engine_that_is_kept_is_not_made_anew_for_memory_that_comes_and_goes():
    """A part of what it takes is there already; of another one all would have to come."""
    enough_for_one = takes(1, 1.01)
    assert plan(1, free=enough_for_one).ranks_per_copy == 1
    assert plan(1, free=enough_for_one, ranks_per_kept_copy=2).ranks_per_copy == 2
    assert plan(1, free=enough_for_one - 2 * GIB).ranks_per_copy == 2
    assert plan(1, free=enough_for_one - 2 * GIB, ranks_per_kept_copy=1).ranks_per_copy == 1
    assert plan(1, free=enough_for_one - 4 * GIB, ranks_per_kept_copy=1).ranks_per_copy == 2
    assert plan(1, tensor_parallel=4, ranks_per_kept_copy=2).ranks_per_copy == 4


def test_the_fewest_ranks_that_have_room_for_a_sequence_hold_a_copy():
    assert plan(1, free=takes(1, 1.01)) == Plan(False, 1, 1)
    assert plan(free=takes(1, 1.01)) == Plan(False, 5, 1)
    assert plan(free=takes(1, 0.99)) == Plan(False, 2, 64, 2)
    assert plan(64, free=takes(2, 1.01)) == Plan(False, 8, 1, 2)
    assert plan(free=takes(2, 0.99), needs=NEEDS).ranks_per_copy == 4
    assert plan(free=takes(4, 0.99), needs=NEEDS).ranks_per_copy == 8
    # Asked for, more ranks hold it than need to, and not fewer than there is room for.
    assert plan(free=takes(2, 7.5), tensor_parallel=2) == Plan(False, 2, 7, 2)
    assert plan(free=takes(2, 7.5), tensor_parallel=4).ranks_per_copy == 4


@given(
    num_requests=st.integers(1, 5000),
    possible=st.sampled_from([(1,), (1, 2), (1, 2, 4), (1, 3), (1, 2, 3, 6), (1, 2, 4, 8)]),
    num_groups=st.integers(1, 3),
    at_least=st.integers(0, 3),
    num_that_fit=st.floats(1.01, 600),
    ranks=st.one_of(st.just("auto"), st.integers(1, 30)),
    batch_size=st.one_of(st.just("auto"), st.integers(1, 700)),
)
def test_memory_bounds_what_is_answered_at_once_and_no_copy_has_nothing_to_do(
    num_requests, possible, num_groups, at_least, num_that_fit, ranks, batch_size
):
    world_size = possible[-1] * num_groups
    needs = replace(NEEDS, sequence={n: GIB // (8 * n) for n in possible})
    fewest = possible[min(at_least, len(possible) - 1)]
    free = takes(fewest, num_that_fit, needs)
    chosen = plan(num_requests, free, world_size, needs, ranks=ranks, batch_size=batch_size)
    each = chosen.ranks_per_copy
    assert each in possible
    assert takes(each, chosen.batch_size, needs) <= free + 1e-3 * needs.sequence[each]
    assert all(takes(n, 1, needs) > free for n in possible if n < each)
    assert not chosen.is_sharded
    assert chosen.num_ranks == chosen.num_copies * each <= world_size
    assert 1 <= chosen.num_copies <= num_requests
    assert ranks == "auto" or chosen.num_ranks <= max(ranks, each)
    assert 1 <= chosen.batch_size <= (ROWS.most if batch_size == "auto" else batch_size)


@given(
    ranks_per_copy=st.integers(1, 8),
    num_groups=st.integers(1, 8),
    logging_rank=st.integers(0, 63),
    share=st.floats(0, 1),
)
def test_every_rank_has_a_part_of_one_copy_and_the_logging_ranks_is_the_first(
    ranks_per_copy, num_groups, logging_rank, share
):
    world_size = ranks_per_copy * num_groups
    logging_rank %= world_size
    num_copies = max(1, round(share * num_groups))
    chosen = Plan(False, num_copies * ranks_per_copy, 1, ranks_per_copy)
    assert chosen.num_copies == num_copies
    positions = [chosen.position(rank, logging_rank, world_size) for rank in range(world_size)]
    assert positions[logging_rank] == 0
    groups = [[rank for rank in range(world_size) if positions[rank] == position] for position in range(num_groups)]
    for position, ranks in enumerate(groups):
        assert ranks == list(range(ranks[0], ranks[0] + ranks_per_copy))
        assert ranks[0] % ranks_per_copy == 0
        assert chosen.first_rank(position, logging_rank, world_size) == ranks[0]
    # From the logging rank's group on, and round the end.
    firsts = [ranks[0] for ranks in groups]
    begin = firsts.index(0)
    assert firsts[begin:] + firsts[:begin] == list(range(0, world_size, ranks_per_copy))


def test_where_each_rank_has_a_copy_positions_count_from_the_logging_rank():
    assert [Plan(False, 2, 1).position(rank, 1, 4) for rank in range(4)] == [3, 0, 1, 2]
    assert [Plan(False, 2, 1, 2).position(rank, 3, 6) for rank in range(6)] == [2, 2, 0, 0, 1, 1]
    assert [Plan(False, 4, 1, 2).first_rank(position, 3, 6) for position in range(3)] == [2, 4, 0]


NO_ROOM = {
    "alone": ({"world_size": 1, "needs": replace(NEEDS, sequence={1: GIB})}, "needs 22.0 GiB on each device, and "),
    "all together": ({}, "needs 7.0 GiB on each device of 8 that hold the model together, and "),
    "as asked": ({"tensor_parallel": 2}, "needs 13.1 GiB on each device of 2 that hold the model together, and "),
    "asked alone": ({"tensor_parallel": 1}, "needs 21.1 GiB on each device, and "),
}


@pytest.mark.parametrize("kind", NO_ROOM)
def test_where_nothing_fits(kind):
    settings, message = NO_ROOM[kind]
    with pytest.raises(MemoryError, match=re.escape(f"vLLM {message}5.0 GiB can be had")):
        plan(free=5 * GIB, **settings)


@pytest.mark.parametrize("tensor_parallel", [3, 16])
def test_what_cannot_be_divided_is_not_tried(tensor_parallel):
    expected = f"generation.tensor_parallel={tensor_parallel}: 8 ranks can hold this model together in groups of 1, 2, "
    with pytest.raises(ValueError, match=re.escape(f"{expected}4, 8")):
        plan(free=0, tensor_parallel=tensor_parallel)
