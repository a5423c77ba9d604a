"""Examines architectures in forks of one process that has the imports done: `python forks.py`.

A line in is a name, a line out its results as JSON. What crashes, hangs or takes all memory costs its own row. No
thread may be running here when it forks: nothing but imports happens.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

MAX_CPU_S = 60
"""An architecture that takes more time of a core is given up: tiny models take one to five seconds."""

MAX_S = 600.0
"""And one that waits for ever, whatever else the machine does."""

MAX_BYTES = 8 << 30
"""Of address space, for an architecture that the zoo does not shrink."""


class Zookeeper:
    """The process that forks, asked from outside for one architecture after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
            },
            text=True,
        )  # fmt: skip

    def examine(self, name: str) -> dict[str, Any]:
        """Returns what `checks.examine` does; {"not built": why} where it raised or did not end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    sys.path[:0] = [str(Path(__file__).parents[level]) for level in (1, 2)]
    sys.path.remove(str(Path(__file__).parent))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import transformers.generation.utils
    import transformers.models.llama.modeling_llama
    from zoo import checks

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for line in sys.stdin:
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(reader)
            with os.fdopen(writer, "w") as pipe:
                json.dump(examine(checks, line.strip()), pipe)
            os._exit(0)  # without what is registered for the end of the parent
        os.close(writer)
        print(wait(pid, reader), file=replies, flush=True)


def examine(checks: Any, name: str) -> dict[str, Any]:
    from zoo.patients import describe

    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))  # a fork begins at 0
    try:
        return checks.examine(name)
    except Exception as e:
        traceback.print_exc()
        return {"not built": str(e) if isinstance(e, LookupError) else describe(e)}


def wait(pid: int, reader: int) -> str:
    """A fork's result as JSON. It is killed after `MAX_S`."""
    deadline = time.monotonic() + MAX_S
    chunks = []
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not (chunk := os.read(reader, 1 << 16)):
            break
        chunks.append(chunk)
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 0 and chunks:
        return b"".join(chunks).decode()
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return json.dumps({"not built": f"no end within {MAX_CPU_S} s"})
    return json.dumps({"not built": f"ended with status {status}"})


if __name__ == "__main__":
    main()
