"""The process that forks the ranks of distributed tests.

It is a fork of pytest itself, made before the first test: what tests start (threads of autograd, of trackers, of
gloo) is not in it, so that its own forks find no lock held by a thread that they do not have.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

GRACE_S = 3.0
"""For the other ranks, once one has failed."""

_PRELOADED = (
    "verl_valgen.rounds.rounds",
    "verl_valgen.backends.hf",
    "verl_valgen.backends.fast.backend",
    "verl_valgen.backends.lockstep",
    "verl.utils.fsdp_utils",
    "torch.distributed.checkpoint.state_dict",
    "torch.utils.serialization.config",
    "omegaconf._impl",
    "peft",
)
"""What the tests' functions import, so that no rank need do it again."""


@dataclass(frozen=True)
class Run:
    function: Callable[..., Any]
    world_size: int
    files: Path
    """An empty folder for what the ranks return (`<rank>.pt`) and write (`<rank>.txt`)."""
    args: tuple[Any, ...]
    max_run_s: float


@dataclass
class Outcome:
    statuses: list[int]
    """Exit status by rank, a signal's being negative."""
    left_waiting: list[int] = field(default_factory=list)
    """Ranks that had to be killed."""
    first_failed: int | None = None
    """The rank that failed before the others did, which may have failed because of it."""


def serve(requests: Connection) -> NoReturn:
    """Answers each `Run` with an `Outcome`, until the other end is closed."""
    try:
        _detach(requests)
        while True:
            run = requests.recv()
            _preload()
            requests.send(_run(run, requests))
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # never back into pytest, of which this is a copy


def _detach(requests: Connection) -> None:
    """Leaves pytest's session and files: a pipe of xdist's would never be seen to close while this process has it."""
    os.setsid()  # an interrupt from the terminal is for pytest
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        # Overwritten, not closed: the objects that own them are still there, and would close somebody else's.
        if descriptor not in (1, 2, nothing, requests.fileno()):
            os.dup2(nothing, descriptor)
    torch.set_num_threads(1)


def _preload() -> None:
    from verl_valgen.hosts.cpu import cpu_platform

    with cpu_platform():
        for name in _PRELOADED:
            importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: forks might hang"


def _run(run: Run, requests: Connection) -> Outcome:
    running: dict[int, int] = {}
    for rank in range(run.world_size):
        if (pid := os.fork()) == 0:
            _run_rank(run, rank)
        os.setpgid(pid, pid)
        running[pid] = rank
    outcome = Outcome(statuses=[0] * run.world_size)
    deadline = time.monotonic() + run.max_run_s
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = running.pop(pid)
            outcome.statuses[rank] = os.waitstatus_to_exitcode(status)
            if outcome.statuses[rank] != 0 and rank not in outcome.left_waiting:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        elif time.monotonic() > deadline and not outcome.left_waiting:
            outcome.left_waiting = sorted(running.values())
            _kill(running)
        elif requests.poll(0.01):  # nothing is sent during a run: the tests' process has ended
            _kill(running)
            raise EOFError
    outcome.first_failed = _first_failed(run, outcome)
    return outcome


def _kill(ranks: dict[int, int]) -> None:
    """Kills the ranks and what they started, once they have written where they are."""
    for pid in ranks:
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    for pid in ranks:
        os.killpg(pid, signal.SIGKILL)


def _first_failed(run: Run, outcome: Outcome) -> int | None:
    failed = [rank for rank, status in enumerate(outcome.statuses) if status and rank not in outcome.left_waiting]
    return min(failed, key=lambda rank: (run.files / f"{rank}.txt").stat().st_mtime_ns, default=None)


def _run_rank(run: Run, rank: int) -> NoReturn:
    status = 1
    try:
        output = open(run.files / f"{rank}.txt", "w", buffering=1)  # noqa: SIM115
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        sys.stdout = sys.stderr = output
        faulthandler.enable(output)
        faulthandler.register(signal.SIGUSR1, output)
        # By a file: a port that was free a moment ago may be another test's by now.
        dist.init_process_group(
            "gloo", init_method=f"file://{run.files}/rendezvous", rank=rank, world_size=run.world_size
        )
        dist.barrier()  # a rank that ends at once would close connections that others still open
        torch.save(run.function(*run.args), run.files / f"{rank}.pt")
        dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
        time.sleep(0.05)  # others that fail because of it write later
    finally:
        sys.stdout.flush()
        os._exit(status)
