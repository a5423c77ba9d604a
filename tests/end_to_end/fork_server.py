"""Runs verl's trainer again and again, with its imports done once: `python fork_server.py MODULE`.

A line in is a run as JSON (see `server.py`), a line out how it ended. Every rank is a fork that runs the trainer as
`python -m MODULE` would, or a program by its file, and ends as any program of Python's ends. No thread may be running
here when it forks: nothing but imports happens. verl_valgen is not imported beyond what verl's plugins load: a fork
loads what a process of its own would.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

_GRACE_S = 20.0
"""For the other ranks, once one has failed."""

_MAX_RUN_S = 300.0
"""A run that has not ended by then is killed, so that its test fails."""

_IMPORTS = ("peft", "transformers.models.llama.modeling_llama", "transformers.generation.utils")
"""What the trainer and the package's rounds would import later, in every fork anew."""

_RAY_IMPORTS = ("verl.single_controller.ray", "ray.dag")


def main(module: str) -> None:
    sys.path[0] = str(Path(__file__).parents[1])  # what runs before a trainer imports `reliability.dying` and the like
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in (module, *_IMPORTS, *(_RAY_IMPORTS if module.endswith("_ray") else ())):
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        running = set()
        for rank in range(request["num_ranks"]):
            if (pid := os.fork()) == 0:
                run_rank(module, request, rank)
                return  # to the end of the program, with all that is registered for it
            running.add(pid)
        print(json.dumps(wait(running)), file=replies, flush=True)


def wait(running: set[int]) -> dict[str, Any]:
    """The worst exit status, a signal's being negative, and when the last process was gone."""
    statuses = []
    deadline = time.monotonic() + _MAX_RUN_S
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.remove(pid)
            statuses.append(os.waitstatus_to_exitcode(status))
            if statuses[-1] != 0:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        elif time.monotonic() > deadline:
            for other in running:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.0 if pid else 0.01)
    return {"status": max(statuses, key=abs), "ended_at": time.time()}


def run_rank(module: str, request: dict[str, Any], rank: int) -> None:
    os.chdir(request["directory"])
    for descriptor, name in ((0, os.devnull), (1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(request["environment"])
    if request["is_distributed"]:
        size = str(request["num_ranks"])
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"]),
        )  # fmt: skip
    program = request["program"]
    sys.path.insert(0, "" if program is None else str(Path(program).parent))
    sys.argv = [program or module, *request["arguments"]]
    exec(compile(request["before"], "<before>", "exec"), {"__name__": "before"})
    if program is None:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1])
