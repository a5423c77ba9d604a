"""Runs a function on several ranks, with gloo: `run_distributed`.

The ranks are forked (see `rank_server.py`), which takes half a second where new processes take forty.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from distributed.rank_server import Outcome, Run, serve

MAX_RUN_S = 60.0
"""Wall time of a run. Most take a second or two on a machine that does nothing else."""


class RankError(RuntimeError):
    """A rank raised an exception, was killed, or was left waiting."""


def run_distributed(
    function: Callable[..., Any], world_size: int, directory: Path, *args: Any, max_run_s: float = MAX_RUN_S
) -> list[Any]:
    """Returns what `function(*args)`, a function of a test module, returned on each rank.

    Raises:
        RankError: Naming the rank, with its traceback, where one failed; naming those that still ran, with their
            stacks, where `max_run_s` was over. No rank is running any more.
    """
    files = Path(mkdtemp(prefix="ranks-", dir=directory))
    outcome = _request(Run(function, world_size, files, args, max_run_s))
    if outcome.statuses != [0] * world_size:
        raise RankError(_describe(outcome, files, max_run_s))
    return [torch.load(files / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


_server: tuple[int, Connection] | None = None
"""Its process, and the way to it."""


def start_server() -> None:
    """Forks the process that forks the ranks: once all test modules are imported, and before a test has run."""
    global _server
    ours, theirs = Pipe()
    if (pid := os.fork()) == 0:
        ours.close()
        serve(theirs)
    theirs.close()
    _server = (pid, ours)


def stop_server() -> None:
    global _server
    if _server is not None:
        pid, connection = _server
        _server = None
        connection.close()  # when the server notices, it kills what still runs, and ends
        os.waitpid(pid, 0)


def _request(run: Run) -> Outcome:
    assert _server is not None, "conftest.py starts it"
    pid, connection = _server
    connection.send(run)
    if not connection.poll(run.max_run_s + 60.0):
        os.kill(pid, signal.SIGKILL)
        raise RankError("the process that forks the ranks does not answer")
    return connection.recv()


def _describe(outcome: Outcome, files: Path, max_run_s: float) -> str:
    """The exception that was raised first, or that none was; then how every other rank ended."""
    failed = outcome.first_failed
    first = [f"no rank failed, but not all had ended after {max_run_s:g} s"] if failed is None else []
    ranks = sorted(range(len(outcome.statuses)), key=lambda rank: rank != failed)
    return "\n".join(first + [_describe_rank(rank, outcome, files) for rank in ranks])


def _describe_rank(rank: int, outcome: Outcome, files: Path) -> str:
    status = outcome.statuses[rank]
    if rank in outcome.left_waiting:
        how = "was left waiting, and was killed"
    elif status < 0:
        how = f"was killed by signal {-status}"
    else:
        how = "failed" if status else "ended well"
    output = (files / f"{rank}.txt").read_text(errors="replace")[-8000:]
    return f"rank {rank} {how}" + (f":\n{output}" if status and output else "")
