"""Clusters of Ray on this machine, which are apart from any other one, and of which nothing is left.

They take a minute for what a forked worker (`fork_group.py`) does in seconds, so that few tests have one.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from end_to_end.trainer import environment_of_a_run

_MARK = "VALGEN_TEST_CLUSTER"
_END_S = 20.0
"""In which all processes must be gone after the driver, or after they were killed."""


class Cluster:
    """What a driver finds, and the processes that came of it.

    Its folder is a short one: it is part of the names of sockets.

    Args:
        hides_devices: Whether runs are on CPU wherever they are.
    """

    def __init__(self, *, hides_devices: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
        self.environment = {
            # Else Ray asks for a token that it writes to the user's folder.
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.folder),
            _MARK: uuid.uuid4().hex,
            **({"CUDA_VISIBLE_DEVICES": ""} if hides_devices else {}),
        }

    def processes(self) -> list[psutil.Process]:
        """All that have our mark in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.environment[_MARK]:
                    found.append(process)
            except psutil.Error:  # gone, a zombie, or somebody else's
                continue
        return found

    def left_over(self) -> list[psutil.Process]:
        """Those that do not end by themselves, once their driver has ended."""
        _, alive = psutil.wait_procs(self.processes(), timeout=_END_S)
        return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def start(self, num_workers: int, environment: Mapping[str, str]) -> str:
        """Starts one as `ray start` does, apart from its drivers; returns its address."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={address.split(':')[1]}"),
            *("--node-ip-address=127.0.0.1", f"--num-gpus={num_workers}", f"--num-cpus={10 * num_workers}"),
            *("--include-dashboard=false", f"--temp-dir={self.folder}", "--object-store-memory=200000000"),
        ]
        own = environment_of_a_run({**self.environment, **environment})
        if "CUDA_VISIBLE_DEVICES" in self.environment:  # Ray wants an entry for each, and so hides them from workers
            own["CUDA_VISIBLE_DEVICES"] = ",".join(["-1"] * num_workers)
        subprocess.run(command, env=own, check=True, timeout=120, stdout=subprocess.DEVNULL, cwd=self.folder)
        return address

    def end(self) -> None:
        for process in self.processes():
            process.kill()
        self.left_over()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def own_cluster(*, hides_devices: bool = True) -> Iterator[Cluster]:
    cluster = Cluster(hides_devices=hides_devices)
    try:
        yield cluster
    finally:
        cluster.end()
