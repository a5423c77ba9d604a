"""The loaders that stand in for verl's while `fit()` runs."""

from __future__ import annotations

import pytest

from verl_valgen.hosts.loaders import CountingLoader, NotifyingLoader


class Loader(list):
    batch_size = 4

    def state_dict(self):
        return {"position": 7}


def test_the_same_batches_in_the_same_order():
    batches = Loader(["a", "b", "c"])
    assert list(CountingLoader(batches, 0)) == list(NotifyingLoader(batches, lambda: None)) == ["a", "b", "c"]


@pytest.mark.parametrize("proxy", [CountingLoader(Loader("ab"), 0), NotifyingLoader(Loader("ab"), lambda: None)])
def test_everything_else_is_the_loaders_own(proxy):
    assert (len(proxy), proxy.batch_size, proxy.state_dict()) == (2, 4, {"position": 7})


def test_a_batch_in_use_is_counted_over_epochs():
    loader = CountingLoader(Loader("abc"), start=10)
    counts = [loader.count for _ in range(2) for _ in loader]
    assert counts == [11, 12, 13, 14, 15, 16]


def test_the_end_is_told_after_the_last_batch_was_used():
    events = []
    for batch in NotifyingLoader(Loader("ab"), lambda: events.append("end")):
        events.append(batch)
    assert events == ["a", "b", "end"]


def test_an_empty_loop_ends_too_and_a_loop_left_early_does_not():
    events = []
    list(NotifyingLoader(Loader(), lambda: events.append("empty")))
    for _ in NotifyingLoader(Loader("ab"), lambda: events.append("left")):
        break
    assert events == ["empty"]


def test_the_beginning_is_told_once_before_the_first_batch():
    events = []
    loader = CountingLoader(Loader("ab"), 7, lambda: events.append(loader.count))
    for _ in range(2):
        events += list(loader)
    assert events == [7, "a", "b", "a", "b"]
