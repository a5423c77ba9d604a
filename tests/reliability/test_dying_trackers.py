"""Trackers and disks that fail while a run goes on: training is the same, no round waits, and the process ends in time.

Whole runs of verl's trainer on one rank. What fails does so before the round of step 2, at the hand of the run itself
(`dying.py`); what comes back does so later, before a round as well.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from disks import mounted
from end_to_end.server import ForkedRun, TrainerServer
from end_to_end.trainer import strategy
from killed_writer import NUM_SAMPLES
from readback import read_mlflow
from reliability.conftest import record_figure
from reliability.dying import MlflowServer
from reliability.round_times import notes_of
from reliability.test_killed import attempts_by_step
from same_training import SEED_AND_REPORT, differences, random_states

pytestmark = [pytest.mark.slow, pytest.mark.any_verl]

STEPS = [1, 2, 3, 4, 5]
GENERATION = [
    "+generation.max_new_tokens=6", f"+trainer.max_val_samples={NUM_SAMPLES}",
    "+generation.metrics=[growing.py:growing]", "+generation.best_metric=growing",
]  # fmt: skip
GROWING = """
def growing(sample):
    return sample.step
"""
"""A metric that is the best so far at every round: `best.json` is written each time."""

MAX_ROUND_S = 1.0 + 4.0
MAX_EXIT_S = 10.0 + 10.0
"""What is promised beyond a run in which nothing fails, and what a busy machine may add."""


@dataclass(frozen=True)
class Seen:
    """A finished run, and what it noted of itself."""

    run: ForkedRun

    @cached_property
    def notes(self) -> dict[str, Any]:
        return notes_of(self.run.directory)

    @property
    def round_s(self) -> list[float]:
        return list(self.notes["round_s"].values())

    @property
    def exit_s(self) -> float:
        """From the end of training to that of the process; Python itself takes seconds of it."""
        return self.run.ended_at - self.notes["ended_at"]


@dataclass(frozen=True)
class Runs:
    """Makes runs that are alike but for what fails."""

    server: TrainerServer
    arguments: list[str]

    def make(
        self, directory: Path, before: str, *, logger: str = "", environment: Mapping[str, str] | None = None
    ) -> Seen:
        """
        Args:
            before: Defines `events`; see `dying.watch`.
            logger: Of verl's, beside the console.
        """
        directory.mkdir(exist_ok=True)
        (directory / "growing.py").write_text(GROWING)
        arguments = [*self.arguments, f"trainer.logger=[{','.join(filter(None, ['console', logger]))}]"]
        imports = "from pathlib import Path\nfrom reliability import disks, dying\n"
        program = f"{SEED_AND_REPORT}\n{imports}{before}\ndying.watch(events)"
        result = self.server.run(directory, arguments, environment=environment, before=program)
        assert result.returncode == 0, result.output[-5000:]
        return Seen(result)


@pytest.fixture(scope="module")
def runs(server, assets) -> Runs:
    return Runs(
        server,
        [
            *assets.overrides(multiturn=True), strategy("fsdp2"), *GENERATION,
            f"trainer.total_training_steps={STEPS[-1]}", "trainer.test_freq=1", "trainer.save_freq=-1",
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(runs, tmp_path_factory) -> Seen:
    """Nothing fails."""
    seen = runs.make(tmp_path_factory.mktemp("reference") / "run", "events = {}")
    assert len(seen.run.logged("train/loss")) == len(seen.run.logged("val/loss")) == len(STEPS)
    assert len(seen.round_s) == len(STEPS)
    assert seen.run.warnings == []
    assert_rounds(seen, STEPS)
    return seen


def torch_and_numpy_states(seen: Seen) -> dict[str, Any]:
    """But for Python's own, from which clients of trackers draw how long to wait before they ask again."""
    (states,) = random_states(seen.run).values()
    return {name: states[name] for name in ("torch", "numpy")}


def assert_unharmed(case: str, seen: Seen, reference: Seen, warnings: list[str]) -> None:
    """Training was the same and nothing waited; each cause was warned of once, `warnings` being patterns of all."""
    record_figure(
        f"dying trackers: {case}",
        longest_round_s=max(seen.round_s), exit_s=seen.exit_s, num_warnings=len(seen.run.warnings),
        longest_round_without_s=max(reference.round_s), exit_without_s=reference.exit_s,
    )  # fmt: skip
    for key in ("train/loss", "val/loss"):
        assert seen.run.logged(key) == reference.run.logged(key)
    assert list(differences(torch_and_numpy_states(seen), torch_and_numpy_states(reference))) == []
    assert len(seen.round_s) == len(STEPS)
    assert max(seen.round_s) <= max(reference.round_s) + MAX_ROUND_S
    assert seen.exit_s <= reference.exit_s + MAX_EXIT_S
    assert len(seen.run.warnings) == len(warnings), seen.run.warnings
    for warning, pattern in zip(seen.run.warnings, warnings, strict=True):
        assert re.fullmatch(pattern, warning)


def assert_rounds(seen: Seen, steps: list[int]) -> None:
    """The step files are those of `steps`, each whole, the page has them, and the best value is that of the last."""
    generations = seen.run.generations
    assert sorted(attempts_by_step(generations)) == steps
    assert {path.name for path in generations.iterdir()} - {"runs.json"} == {
        "best.json",
        "index.html",
        "data",
        *(f"step_{step:08d}.{kind}" for step in steps for kind in ("jsonl", "numbers.json")),
    }
    data = {path.name for path in (generations / "data").iterdir()}
    assert data == {"steps.js", *(f"step_{step:08d}.js" for step in steps)}
    best = json.loads((generations / "best.json").read_text())
    assert (best["value"], best["step"]) == (float(STEPS[-1]), STEPS[-1])
    assert [record["step"] for record in best["before"]] == STEPS[:-1]


@pytest.mark.parametrize(
    ("how", "warnings"),
    [
        (
            "kill",
            [
                r"wandb: a round was not recorded: wandb\.[\w.]*\.MailboxClosedError",
                "wandb: disabled after 3 failures in a row; the samples are in the JSONL files",
            ],
        ),
        (
            "freeze",
            [
                "wandb: a round takes longer than 0.8 s to record; training does not wait",
                "wandb: a round was not recorded: TimeoutError: wandb did not finish 5 calls in time",
            ],
        ),
    ],
    ids=["killed", "frozen"],
)
def test_wandb_whose_process_fails_costs_a_second(runs, reference, tmp_path, how, warnings):
    before = f"""
def fail():
    dying.{how}_wandb()
    dying.shield_verl()

events = {{2: fail}}
"""
    seen = runs.make(tmp_path / "run", before, logger="wandb", environment={"WANDB_MODE": "offline"})
    assert_unharmed(f"wandb, {how}", seen, reference, warnings)
    assert_rounds(seen, STEPS)


class SwanlabHost:
    """What SwanLab's client needs of its service, on loopback, until it has a table of samples: then it is gone."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        """Of the tables that came."""
        host = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                found = host.answer(self.path, body)
                content = json.dumps(found).encode()
                self.send_response(201 if self.path.endswith("/experiment") else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                if host.steps:
                    self.server.shutdown()
                    self.server.server_close()

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/api/login/api_key":
            in_a_year = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(time.time() + 365 * 24 * 3600))
            return {"sid": "sid", "expiredAt": in_a_year, "userInfo": {"username": "user", "name": "user"}}
        if path == "/api/project/user/project":
            project = {"cuid": "project", "name": "project", "path": "/user/project", "version": 1}
            return project | {"group": {"username": "user"}, "_count": {"experiments": 0}}
        if path == "/api/project/user/project/experiment":
            return {"cuid": "experiment", "name": "experiment", "slug": "experiment"}
        if path == "/api/resources/presigned/put":
            return {"urls": [f"{self.url}/put" for _ in json.loads(body)["paths"]]}
        if path == "/api/house/metrics":
            metrics = json.loads(body)["metrics"]
            self.steps += [metric["index"] for metric in metrics if metric.get("key") == "val/samples"]
        return {}


def test_swanlab_whose_host_is_gone_goes_on_without_it(runs, reference, tmp_path):
    """SwanLab itself, with uploads to a host that took those of the first round: only the service is not the real one.

    It queues what it cannot upload and says so itself, so that nothing fails here.
    """
    host = SwanlabHost()
    before = f"""
def shield():
    dying.wait_until(lambda: not dying.is_answering({host.url!r}))
    dying.shield_verl()
    dying.shield_exit()

events = {{2: shield, 4: lambda: dying.wait_until(dying.swanlab_has_failed)}}
"""
    environment = {
        "SWANLAB_MODE": "cloud", "SWANLAB_API_KEY": "key-of-nobody", "SWANLAB_API_HOST": host.url,
        "SWANLAB_WEB_HOST": host.url, "SWANLAB_SAVE_DIR": str(tmp_path / "swanlab"),
    }  # fmt: skip
    seen = runs.make(tmp_path / "run", before, logger="swanlab", environment=environment)
    assert host.steps == [1]
    assert_unharmed("swanlab without host", seen, reference, [])
    assert_rounds(seen, STEPS)


def test_a_folder_that_is_removed_is_made_again(runs, reference, tmp_path):
    before = "import shutil\nevents = {2: lambda: shutil.rmtree('checkpoints')}"
    seen = runs.make(tmp_path / "run", before)
    assert_unharmed("folder removed", seen, reference, [])
    assert_rounds(seen, STEPS[1:])


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """The run's folder for checkpoints and samples, on a small file system of its own; verl saves half a megabyte."""
    with mounted(tmp_path / "run" / "checkpoints", "8m") as directory:
        yield directory


@pytest.mark.parametrize(
    ("failure", "repair", "error"),
    [
        pytest.param(
            "disks.fill('checkpoints')", "disks.make_room('checkpoints')", "No space left on device", id="full"
        ),
        pytest.param(
            "disks.remount('checkpoints', 'ro')",
            "disks.remount('checkpoints', 'rw')",
            "Read-only file system",
            id="read-only",
        ),
    ],
)
def test_a_disk_costs_the_rounds_in_which_it_fails(runs, reference, disk, failure, repair, error):
    """However many those are. It is repaired before the last, after which verl saves a checkpoint."""
    seen = runs.make(disk.parent, f"events = {{2: lambda: {failure}, 5: lambda: {repair}}}")
    warnings = [
        rf"jsonl: a round was not recorded: OSError: \[Errno \d+\] {error}.*",
        rf"best.json: a round was not recorded: OSError: \[Errno \d+\] {error}.*",
        rf"page: a round was not recorded: OSError: \[Errno \d+\] {error}.*",  # heard of in the next round
    ]
    assert_unharmed(f"disk: {error}", seen, reference, warnings)
    assert list(seen.run.checkpoints.glob("global_step_*"))
    assert_rounds(seen, [1, 5])


@pytest.fixture(scope="module")
def started_once(tmp_path_factory) -> Iterator[MlflowServer]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"), port)
    yield server
    server.kill()


@pytest.fixture
def mlflow_server(started_once) -> MlflowServer:
    """Answers. It takes long to start: the same for all, unless it is dead."""
    if not started_once.is_answering():
        started_once.kill()
        started_once.start()
    return started_once


def make_run_with(server: MlflowServer, runs: Runs, directory: Path, events: str, **environment: str) -> Seen:
    """A run with a server, and with MLflow's own timeouts and retries: of four minutes in all."""
    before = f"""
server = dying.MlflowServer(Path({str(server.directory)!r}), {server.port})

{events}
"""
    return runs.make(directory, before, logger="mlflow", environment={"MLFLOW_TRACKING_URI": server.uri, **environment})


def test_mlflow_gets_all_rounds_once_its_server_is_back(runs, reference, mlflow_server, tmp_path):
    """Also those of the time in between, and in order: MLflow asks again, and the calls after that one are queued."""
    events = """
def kill():
    global take_back
    dying.wait_until_mlflow_has(1)
    server.kill()
    take_back = dying.shield_verl()

def start():
    server.start()
    dying.wait_until_mlflow_has(3)
    take_back()

events = {2: kill, 4: start}
"""
    # It asks again after 0, 2, 4, ... 64 s; else after twice as long, which only the test would wait for.
    seen = make_run_with(mlflow_server, runs, tmp_path / "run", events, MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR="1")
    assert_unharmed("mlflow restarted", seen, reference, [])
    assert_rounds(seen, STEPS)
    held = read_mlflow(mlflow_server.uri, newest_run(mlflow_server))
    assert sorted(held["tables"]) == sorted(held["metrics"]["val/gen/num_samples"]) == STEPS
    for step in STEPS:
        assert generations(held["tables"][step]) == [sample["generation"] for sample in seen.run.samples(step)]
    assert generations(held["latest"]) == generations(held["tables"][STEPS[-1]])


def newest_run(server: MlflowServer) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("project")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    return runs[0].info.run_id


def generations(table: dict[str, Any]) -> list[str]:
    column = table["columns"].index("generation")
    return [row[column] for row in table["data"]]


@pytest.mark.parametrize("how", ["freeze", "kill"])
def test_mlflow_whose_server_fails_holds_nobody_up(runs, reference, mlflow_server, tmp_path, how):
    events = f"""
def fail():
    dying.wait_until_mlflow_has(1)
    server.{how}()
    dying.shield_verl()
    dying.shield_exit()

events = {{2: fail}}
"""
    try:
        seen = make_run_with(mlflow_server, runs, tmp_path / "run", events)
        assert not mlflow_server.is_answering()
    finally:
        if how == "freeze":
            mlflow_server.thaw()
    # Rounds 2 to 5 are a call each, and one more closes the tracker.
    unfinished = "mlflow: a round was not recorded: TimeoutError: mlflow did not finish 5 calls in time"
    assert_unharmed(f"mlflow, {how}", seen, reference, [unfinished])
    assert_rounds(seen, STEPS)
