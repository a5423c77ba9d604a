"""Jobs run in order behind the caller's back, and their errors find the way back."""

from __future__ import annotations

import threading
import time

import pytest

from verl_valgen.trackers.background import BackgroundQueue

LONG_S = 30.0


def _failing_job():
    raise ConnectionError("down")


def test_jobs_run_in_order_on_another_thread():
    queue, seen = BackgroundQueue("test", 100), []
    for i in range(20):
        queue.submit(lambda i=i: seen.append((i, threading.current_thread())))
    queue.drain(LONG_S)
    assert [i for i, _ in seen] == list(range(20))
    assert {thread.daemon for _, thread in seen} == {True}
    assert threading.current_thread() not in {thread for _, thread in seen}


def test_error_comes_back_once_and_later_jobs_still_run():
    queue, seen = BackgroundQueue("test", 100), []
    queue.submit(_failing_job)
    with pytest.raises(ConnectionError, match="down"):
        queue.drain(LONG_S)
    queue.submit(_failing_job)
    with queue._changed:
        assert queue._changed.wait_for(lambda: not queue._pending and not queue._is_busy, LONG_S)
    with pytest.raises(ConnectionError, match="down"):
        queue.submit(lambda: seen.append("after"))
    queue.drain(LONG_S)
    assert seen == ["after"]


def test_full_queue_drops_the_oldest_and_says_so():
    queue, seen, gate, started = BackgroundQueue("test", 2), [], threading.Event(), threading.Event()
    queue.submit(lambda: (started.set(), gate.wait(LONG_S)))
    assert started.wait(LONG_S)
    queue.submit(lambda: seen.append(1))
    queue.submit(lambda: seen.append(2))
    with pytest.raises(TimeoutError, match="test does not keep up"):
        queue.submit(lambda: seen.append(3))
    gate.set()
    queue.drain(LONG_S)
    assert seen == [2, 3]


def test_drain_is_bounded_and_gives_up_what_waits():
    queue, seen, gate = BackgroundQueue("test", 10), [], threading.Event()
    queue.submit(lambda: gate.wait(LONG_S))
    queue.submit(lambda: seen.append(1))
    with pytest.raises(TimeoutError, match=r"did not finish \d calls in time"):
        queue.drain(0.1)  # the job itself would take LONG_S
    gate.set()
    queue.drain(LONG_S)
    assert seen == []


def test_one_that_was_late_is_waited_for_again_once_it_is_done():
    queue, gate = BackgroundQueue("test", 10), threading.Event()
    queue.submit(lambda: gate.wait(LONG_S))
    assert not queue.wait(0.01)
    queue.submit(lambda: None)
    assert not queue.wait(LONG_S)  # behind the late one, not at all
    gate.set()
    queue.drain(LONG_S)
    queue.submit(lambda: time.sleep(0.05))
    assert queue.wait(LONG_S)


def test_drain_without_jobs_returns_at_once():
    BackgroundQueue("test", 10).drain(0.0)
