"""Trackers that fail while a run goes on. For the run and for its test.

verl calls its trackers on the trainer's thread, and so do the trackers' own hooks when a process ends: where the other
side is dead they raise, or wait for minutes. A run is kept from both (`shield_verl`, `shield_exit`) from the event on,
so that what is left to see is verl_valgen's own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reliability.round_times import watch_rounds

_LONGEST_WAIT_S = 200.0


def watch(events: Mapping[int, Callable[[], object]]) -> None:
    """Notes the rounds (`round_times.py`), and calls what `events` has for a step before the round of that step."""

    @contextlib.contextmanager
    def after_event(step: int) -> Iterator[None]:
        if step in events:
            events[step]()
        yield

    watch_rounds(after_event)


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"{is_so} did not come true"
        time.sleep(0.05)


def shield_verl() -> Callable[[], None]:
    """verl logs to the console alone, and does not end its trackers' runs. Returns what takes that back."""
    from verl.utils.tracking import Tracking

    log, end = Tracking.log, Tracking.__del__

    def log_to_console(self: Tracking, data: Any, step: int, backend: Any = None) -> None:
        log(self, data, step, backend=["console"])

    Tracking.log, Tracking.__del__ = log_to_console, lambda self: None

    def take_back() -> None:
        Tracking.log, Tracking.__del__ = log, end

    return take_back


def shield_exit() -> None:
    """MLflow and SwanLab do not end their runs when the process ends: MLflow waits four minutes, SwanLab has no limit.

    WandB's hook has nobody to wait for once its process is dead: it raises, and Python prints that.
    """
    if mlflow := sys.modules.get("mlflow"):
        atexit.unregister(mlflow.tracking.fluent._safe_end_run)
    if (swanlab := sys.modules.get("swanlab")) and swanlab.has_run():
        atexit.unregister(swanlab.get_run()._handle_atexit)


def swanlab_has_failed() -> bool:
    """Whether SwanLab has tried to upload something, and says that it could not."""
    return any("Upload failed" in path.read_text() for path in Path("swanlog").glob("run-*/debug/debug.log"))


def is_answering(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


@dataclass(frozen=True)
class MlflowServer:
    """`mlflow server` on loopback, in a process group of its own, by the folder that it keeps everything in."""

    directory: Path
    port: int

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """With the store that is there; returns when it answers."""
        options = {
            "host": "127.0.0.1",
            "port": self.port,
            "workers": 1,
            "backend-store-uri": f"sqlite:///{self.directory}/mlflow.db",
            "artifacts-destination": self.directory / "artifacts",
        }
        with open(self.directory / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *(f"--{name}={value}" for name, value in options.items())],
                stdout=log,
                stderr=log,
                start_new_session=True,
                # Eight more processes, for evaluations that nobody asks for here.
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        (self.directory / "pid").write_text(str(process.pid))
        wait_until(self.is_answering)

    def is_answering(self) -> bool:
        return is_answering(f"{self.uri}/health")

    def kill(self) -> None:
        self._send(signal.SIGKILL)
        wait_until(lambda: not self.is_answering())

    def freeze(self) -> None:
        """It still is connected to, by the system, and answers no more."""
        self._send(signal.SIGSTOP)
        wait_until(lambda: not self.is_answering())

    def thaw(self) -> None:
        self._send(signal.SIGCONT)
        wait_until(self.is_answering)

    def _send(self, number: int) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has not been started, or is dead
            os.killpg(int((self.directory / "pid").read_text()), number)


def wait_until_mlflow_has(step: int) -> None:
    """All of a round is there once its numbers are, which come last."""
    import mlflow

    client, run_id = mlflow.MlflowClient(), mlflow.active_run().info.run_id
    wait_until(lambda: step in [metric.step for metric in client.get_metric_history(run_id, "val/gen/num_samples")])


def kill_wandb() -> None:
    """Ends this process' wandb-core; returns when WandB's own calls fail as they will from now on."""
    import wandb
    from wandb.sdk.mailbox.mailbox import MailboxClosedError

    os.kill(_idle_wandb(), signal.SIGKILL)

    def is_noticed() -> bool:
        try:
            wandb.run.log({"probe": 0.0}, step=wandb.run.step)
        except MailboxClosedError:
            return True
        except Exception:  # of a call that the death came in the middle of
            return False
        return False

    wait_until(is_noticed)


def freeze_wandb() -> None:
    """Stops this process' wandb-core. It is killed at exit, before WandB's own hook, which would wait for it."""
    pid = _idle_wandb()
    os.kill(pid, signal.SIGSTOP)
    atexit.register(os.kill, pid, signal.SIGKILL)


def _idle_wandb() -> int:
    """The number of this process' wandb-core, once it has the first round: the numbers come last."""
    import wandb

    wait_until(lambda: "val/gen/num_samples" in wandb.run.summary.keys())  # noqa: SIM118  (it is no dict)
    (pid,) = [pid for pid, command in _children() if "wandb-core" in command]
    return pid


def _children() -> list[tuple[int, str]]:
    """Number and command line of each child of this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid():
                found.append((int(folder.name), (folder / "cmdline").read_text()))
    return found
