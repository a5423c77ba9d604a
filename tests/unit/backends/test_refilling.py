"""Which row answers which request, in any order in which answers end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_valgen.backends.fast.rows import Rows, Waiting, in_chunks, sizes

PROMPTS = ((), (5,), (5, 6), (7,), (8, 9))


class Batch:
    """Rows as a loop would use them, and what lies in each: checked whenever something is written or read."""

    def __init__(self, num_rows: int) -> None:
        self.rows, self.held, self.requests = Rows(num_rows), {}, {}
        self.num_computed = 0

    def admit(self, prompts: dict[int, tuple[int, ...]], waiting: Waiting, num_rows: int) -> list[int]:
        given = self.rows.give(waiting, num_rows)
        assert len({one.row for one in given}) == len(given)
        for one in given:  # what is computed comes first, as in the loop
            assert one.row < num_rows
            assert one.row not in self.requests
            if one.source is None:
                self.held[one.row], self.num_computed = prompts[one.request], self.num_computed + 1
        for one in given:
            if one.source is not None:
                assert self.held[one.source] == prompts[one.request]
        for one in given:
            self.held[one.row] = prompts[one.request]
            self.requests[one.row] = one.request
        return [one.request for one in given]

    def end(self, rows: list[int]) -> list[int]:
        self.rows.release(rows)
        return [self.requests.pop(row) for row in rows]

    def move(self, num_rows: int) -> None:
        for source, target in self.rows.move_together(num_rows):
            assert target < num_rows <= source
            assert target not in self.requests
            self.requests[target] = self.requests.pop(source)
            self.held[target], self.held[source] = self.held[source], self.held.get(target)

    def check(self) -> None:
        assert {row: self.rows.requests[row] for row in self.rows.live()} == self.requests
        assert all(self.rows.prompts[row] == prompt for row, prompt in self.held.items())


@given(st.integers(1, 6), st.lists(st.lists(st.sampled_from(PROMPTS), max_size=15), max_size=3), st.data())
def test_every_request_gets_one_row_that_holds_its_prompt(num_rows, kinds, data):
    batch = Batch(num_rows)
    for kind in kinds:
        prompts = dict(enumerate(kind))
        waiting = Waiting(prompts)
        answered: list[int] = []
        begun: list[int] = []
        size = num_rows
        while waiting or batch.requests:
            begun += batch.admit(prompts, waiting, size)
            batch.check()
            assert not waiting or len(batch.requests) == size, "no row is idle while a request waits"
            if not waiting:
                size = max(1, len(batch.requests))
                batch.move(size)
                batch.check()
                assert batch.rows.live() == list(range(len(batch.requests)))
            ending = data.draw(st.lists(st.sampled_from(batch.rows.live()), min_size=1, unique=True))
            answered += batch.end(ending)
        assert sorted(begun) == sorted(answered) == sorted(prompts)


@given(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=20), st.integers(1, 3))
def test_with_a_row_for_each_request_a_prompt_is_computed_once(kind, num_kinds):
    batch = Batch(len(kind))
    prompts = dict(enumerate(kind))
    for _ in range(num_kinds):
        waiting = Waiting(prompts)
        batch.admit(prompts, waiting, len(kind))
        assert not waiting
        while batch.requests:
            batch.end([max(batch.requests)])
            batch.move(max(1, len(batch.requests)))
    assert batch.num_computed == len(set(kind))


def test_what_a_row_answered_before_is_counted():
    rows = Rows(2)
    waiting = Waiting({0: (1,), 1: (2,), 2: (3,), 3: (3,)})
    rows.give(waiting, 2)
    rows.release([1])
    rows.give(waiting, 2)
    assert rows.num_answered == [0, 1]
    rows.release([0])
    assert [(one.row, one.request, one.source) for one in rows.give(waiting, 2)] == [(0, 3, 1)]


def test_rows_that_were_given_up_hold_no_prompt():
    rows = Rows(1)
    rows.give(Waiting({0: (1,)}), 1)
    rows.release([0])
    rows.forget([0])
    assert rows.give(Waiting({0: (1,)}), 1)[0].source is None


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(256, [256, 64, 16]), (100, [100, 25, 16]), (17, [17, 16]), (16, [16]), (1, [1])]
)
def test_sizes_are_quarters(num_rows, expected):
    assert sizes(num_rows, 16) == expected


@given(st.dictionaries(st.integers(0, 99), st.integers(1, 30), max_size=20), st.integers(1, 100))
def test_chunks_are_within_bounds(lengths, most):
    chunks = in_chunks(lengths, most)
    assert sorted(key for chunk in chunks for key in chunk) == sorted(lengths)
    for chunk in chunks:
        assert len(chunk) == 1 or max(lengths[key] for key in chunk) * len(chunk) <= most
    padding = [max(lengths[key] for key in chunk) for chunk in chunks]
    assert padding == sorted(padding)
