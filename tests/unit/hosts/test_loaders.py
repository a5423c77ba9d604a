"""The loaders that stand in for verl's while `fit()` runs."""

from __future__ import annotations

import pytest
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from verl_valgen.hosts.loaders import CountingLoader, NotifyingLoader, num_batches_left


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


def test_each_batch_is_announced_before_it_is_in_use():
    events = []
    loader = CountingLoader(Loader("ab"), 7, None, lambda: events.append(loader.count))
    for _ in range(2):
        for batch in loader:
            events.append(batch)
    assert events == [7, "a", 8, "b", 9, "a", 10, "b"]


def verls_loader(batch_size=3, num_workers=0):
    """verl's loader of 13 rows."""
    rows = range(13)
    sampler = DistributedSampler(rows, num_replicas=1, rank=0, drop_last=True)
    return StatefulDataLoader(rows, batch_size, sampler=sampler, num_workers=num_workers, drop_last=True)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch_size", [3, 2, 5])
@pytest.mark.parametrize("num_before", [0, 1, 4, 5])
def test_the_batches_that_a_restored_loader_still_has(num_before, batch_size, num_workers):
    """Of four in an epoch, stopped while one of them was in use, or after them; perhaps with another batch size."""
    first = verls_loader(num_workers=num_workers)
    for number, _ in enumerate(first, start=1):
        if number == num_before:
            break
    restored = verls_loader(batch_size, num_workers)
    if num_before:
        restored.load_state_dict(first.state_dict())
    expected = num_batches_left(restored)
    assert expected == len(list(restored))
    assert (expected == 0) == (num_before == 4)
    assert num_batches_left(restored) == len(list(restored)) == len(restored)


def test_a_loader_with_a_state_of_another_kind_is_taken_for_whole():
    loader = Loader("abc")
    loader.next_iter_state = {"position": 2}
    assert num_batches_left(loader) == 3
