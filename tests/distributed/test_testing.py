"""A run of ranks ends in bounded time, whatever happens on one of them, and says which it was."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed.testing import RankError, run_distributed


def meet(*args: int) -> tuple[int, tuple[int, ...]]:
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    return int(tensor.item()), args


def test_every_rank_returns_something(tmp_path: Path):
    assert run_distributed(meet, 3, tmp_path, 1, 2) == [(3, (1, 2))] * 3
    assert run_distributed(meet, 1, tmp_path) == [(1, ())]


def only_rank_1_meets() -> None:
    if dist.get_rank() == 1:
        print("rank 1 goes to the barrier")
        dist.barrier()
    else:
        time.sleep(100)  # were it gone, rank 1 would hear of it


def test_a_rank_that_is_left_waiting_is_named_with_its_stack(tmp_path: Path):
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 was left waiting") as raised:
        run_distributed(only_rank_1_meets, 2, tmp_path, max_run_s=3.0)
    assert time.monotonic() - start < 30
    assert "no rank failed, but not all had ended after 3 s" in str(raised.value)
    assert "rank 1 goes to the barrier" in str(raised.value)
    assert "in only_rank_1_meets" in str(raised.value)
    assert run_distributed(meet, 2, tmp_path) == [(2, ())] * 2  # and the next run is not affected


def rank_1_ends_early(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raises":
            raise KeyError("planted")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(3)
    time.sleep(100)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"\Arank 1 failed:\n(.|\n)*KeyError: 'planted'"),
        ("exits", r"\Arank 1 failed:\n(.|\n)*SystemExit: 3"),
        ("killed", r"\Arank 1 was killed by signal 9"),
    ],
    ids=["raises", "exits", "killed"],
)
def test_a_rank_that_fails_comes_first_and_the_others_are_killed(tmp_path: Path, how: str, message: str):
    start = time.monotonic()
    with pytest.raises(RankError, match=message) as raised:
        run_distributed(rank_1_ends_early, 2, tmp_path, how)
    assert time.monotonic() - start < 30
    assert "rank 0 was left waiting, and was killed:\n" in str(raised.value)


def backward() -> tuple[int, float]:
    weight = torch.ones(3, requires_grad=True)
    (weight * 2).sum().backward()
    return threading.active_count(), float(weight.grad.sum())


def test_what_the_tests_started_is_not_in_the_ranks(tmp_path: Path):
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        backward()  # autograd has threads of its own
        assert run_distributed(backward, 2, tmp_path) == [(1, 6.0)] * 2
    finally:
        end.set()
        thread.join()
