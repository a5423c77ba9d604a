"""What a round makes brings on no collection of all garbage, whose end training would wait for."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from verl_valgen.rounds.restore import uncounted_objects

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python collects garbage another way there")


def num_full_collections() -> int:
    return gc.get_stats()[2]["collections"]


def collections_behind(made_within: Callable[[], AbstractContextManager[None]]) -> int:
    """Of all garbage, behind a round that makes half as many objects as there are, and a step that makes few."""
    gc.collect()
    before, num_objects = num_full_collections(), len(gc.get_objects())
    with made_within():
        of_round: list[Any] = [[] for _ in range(num_objects // 2)]
    of_step: list[Any] = [[] for _ in range(max(100_000, num_objects // 8))]
    del of_round, of_step
    return num_full_collections() - before


def test_what_is_made_within_brings_on_no_full_collection():
    assert collections_behind(nullcontext) > 0
    assert collections_behind(uncounted_objects) == 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_garbage_from_before_is_collected_and_a_failure_leaves_all_to_python():
    class Node:
        pass

    def fail() -> None:
        assert not any(type(thing) is Node for thing in gc.get_objects())
        assert not gc.isenabled()
        raise RuntimeError("planted")

    node: Any = Node()
    node.itself = node
    del node
    with pytest.raises(RuntimeError, match="planted"), uncounted_objects():
        fail()
    assert gc.isenabled()


def test_a_process_that_sees_to_its_garbage_itself_is_left_alone():
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with uncounted_objects():
            assert gc.isenabled()
            made = [[] for _ in range(1000)]
        assert 0 < gc.get_freeze_count() < frozen + len(made) // 2  # some of the frozen may be gone by now
    finally:
        gc.unfreeze()
    gc.disable()
    try:
        with uncounted_objects():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
