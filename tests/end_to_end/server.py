"""verl's trainer without the twelve seconds of imports before each run: see `fork_server.py`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from end_to_end.trainer import IN_ITS_FOLDER, VERL_MODULE, Run, environment_of_a_run


@dataclass(frozen=True)
class ForkedRun(Run):
    """A finished run of the server's."""

    ended_at: float
    """`time.time()` at which its last process was gone."""


class TrainerServer:
    """Runs verl's trainer as `end_to_end.trainer.run` does, one run after the other."""

    def __init__(self, module: str = VERL_MODULE, *, always_before: str = "") -> None:
        """
        Args:
            module: verl's trainer.
            always_before: Goes before each run's `before`.
        """
        self._always_before = always_before
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fork_server.py"), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Asked of NVML, whether there are GPUs does not initialise CUDA, which would not outlive a fork.
            env=environment_of_a_run({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}),
            text=True,
        )

    def run(
        self,
        directory: Path,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        num_ranks: int | None = None,
        before: str = "",
        program: Path | None = None,
    ) -> ForkedRun:
        """One run in `directory`.

        Args:
            num_ranks: None is without what torchrun sets.
            before: A program that every rank runs before the trainer's.
            program: The file to run, of `write_program` or verl's own; None is verl's trainer by its module's name.
        """
        directory.mkdir(parents=True, exist_ok=True)
        outputs = [directory / name for name in ("stdout.txt", "stderr.txt")]
        for path in outputs:  # to which all ranks append
            path.unlink(missing_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        reply = self._ask(
            {
                "directory": str(directory),
                "arguments": [*arguments, *IN_ITS_FOLDER],
                "environment": dict(environment or {}),
                "is_distributed": num_ranks is not None,
                "num_ranks": num_ranks or 1,
                "port": port,
                "before": self._always_before + before,
                "program": None if program is None else str(program),
            }
        )
        stdout, stderr = (path.read_text(errors="replace") for path in outputs)
        return ForkedRun(directory, reply["status"], stdout, stderr, reply["ended_at"])

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the server has ended"
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
