"""Nothing is lost and nothing stands twice, whenever the process is killed; and a disk that is full costs one round.

The default is a part of what `VALGEN_RELIABILITY=full` tries.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from disks import fill, make_room, mounted
from end_to_end.trainer import Run
from killed_writer import METRIC, NUM_SAMPLES, value_of
from readback import history_row, wandb_records
from reliability.conftest import IS_WHOLE
from reliability.test_same_training import BESIDE_TRAINING
from trackers.destinations import make_round, make_sample

from verl_valgen.rounds.recorder import BestFile
from verl_valgen.scores.best import Best
from verl_valgen.trackers.composite import CompositeTracker
from verl_valgen.trackers.jsonl import JsonlTracker

HERE = Path(__file__).parent
NUM_FOLDERS, NUM_KILLS_EACH = (5, 10) if IS_WHOLE else (2, 6)
MOST_MOMENTS = 150
"""About five rounds of `killed_writer.py`."""


def write_rounds(directory: Path, attempt: int, start_step: int, end_step: int, moment: int) -> tuple[int, list[int]]:
    """The status with which the writer ended, and the steps that it called complete."""
    arguments = [str(directory), *map(str, (attempt, start_step, end_step, moment))]
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_writer.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # it takes its process group with it
        check=False,
    )
    return done.returncode, [int(line) for line in done.stdout.split()]


def attempts_by_step(directory: Path) -> dict[int, int]:
    """{step: attempt that wrote it} of the step files in a folder, each of which is whole."""
    found = {}
    for path in directory.glob("step_*.jsonl"):
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines]
        assert rest == "", f"{path.name} ends within a line"
        assert [record["index"] for record in records] == list(range(NUM_SAMPLES))
        ((step, attempt),) = {(record["step"], record["seed"]) for record in records}
        assert path.name == f"step_{step:08d}.jsonl"
        found[step] = attempt
    return found


def attempts_on_page(directory: Path) -> dict[int, int]:
    """{step: attempt} of the page's data, each file of which is whole, for the steps that the page lists."""
    found = {}
    for path in directory.glob("data/*.js"):
        function, _, argument = path.read_text(encoding="utf-8").removesuffix(");\n").partition("(")
        payload = json.loads(argument)
        assert function == ("valgen.index" if path.name == "steps.js" else "valgen.step")
        if function == "valgen.step":
            assert path.name == f"step_{payload['step']:08d}.js"
            (found[payload["step"]],) = {answer["seed"] for answer in payload["answers"]}
        else:
            (listed,) = [run["steps"] for run in payload["runs"]]
    if (directory / "index.html").exists():
        assert (directory / "index.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
        return {step: found[step] for step in listed if step in found}
    return found


def assert_nothing_is_lost(directory: Path, completed: set[tuple[int, int]], num_attempts: int) -> None:
    rounds = [
        (attempt, step)
        for folder in (directory, *directory.glob("old-*"))
        for step, attempt in attempts_by_step(folder).items()
    ]
    assert len(rounds) == len(set(rounds)), "a round stands twice"
    assert completed <= set(rounds), "a round is lost"
    with contextlib.suppress(FileNotFoundError):  # a round ends with it, so that there may be none
        best = json.loads((directory / "best.json").read_text())
        assert best["value"] in [value_of(attempt, best["step"]) for attempt in range(num_attempts)]
        assert (best["metric"], best["mode"]) == (METRIC, "max")


@pytest.mark.slow
@pytest.mark.any_verl
@pytest.mark.parametrize("seed", range(NUM_FOLDERS))
def test_every_round_is_there_whole_and_once_however_often_the_writer_is_killed(tmp_path, seed):
    chance = random.Random(seed)
    directory = tmp_path / "generations"
    completed: set[tuple[int, int]] = set()
    in_force: dict[int, int] = {}  # the attempt that each step of the run as it stands comes from
    start_step = 0
    for attempt in range(NUM_KILLS_EACH):
        moment = chance.randint(1, MOST_MOMENTS)
        status, steps = write_rounds(directory, attempt, start_step, 1000, moment)
        assert status == -signal.SIGKILL, f"moment {moment} from step {start_step}"
        completed |= {(attempt, step) for step in steps}
        in_force |= dict.fromkeys(steps, attempt)
        assert_nothing_is_lost(directory, completed, attempt + 1)
        assert in_force.items() <= attempts_by_step(directory).items()
        assert len(list(directory.glob("*.tmp"))) <= 3  # of the round, of the best value and of the page
        attempts_on_page(directory)
        # A checkpoint is no newer than the last round, and may be older.
        start_step = max(0, max(in_force, default=0) - chance.randint(0, 2))
        in_force = {step: of for step, of in in_force.items() if step <= start_step}

    # What is there when a run that ends in peace has started, and when it has gone on.
    assert write_rounds(directory, NUM_KILLS_EACH, start_step, start_step, 0) == (0, [])
    assert list(directory.glob("*.tmp")) == []
    assert attempts_by_step(directory) == in_force
    status, steps = write_rounds(directory, NUM_KILLS_EACH, start_step, start_step + 2, 0)
    assert status == 0
    assert steps == [start_step + 1, start_step + 2]
    assert_nothing_is_lost(directory, completed, NUM_KILLS_EACH + 1)
    in_force |= dict.fromkeys(steps, NUM_KILLS_EACH)
    assert attempts_by_step(directory) == in_force
    assert attempts_on_page(directory) == in_force
    best = json.loads((directory / "best.json").read_text())
    best_step = max(sorted(in_force), key=lambda step: value_of(in_force[step], step))
    assert (best["step"], best["value"]) == (best_step, value_of(in_force[best_step], best_step))


# The trainer goes into a process group of its own, and takes with it what it has started.
BEFORE = """
import os
os.setsid()
from reliability import killing
"""
# Of one run of three steps, each of which verl saves after its round: the logger, and where death comes.
DEATHS = [
    ("swanlab", "killing.die_in_call('verl_valgen.weights.gather:gather', 2)"),
    ("wandb", "killing.die_in_write('step_00000003.jsonl')"),
    ("mlflow", "killing.die_in_call('verl_valgen.trackers.background:BackgroundQueue.wait', 2)"),
]


def rounds_in_trackers(directory: Path) -> list[list[int]]:
    """The steps whose samples each run holds, as often as it holds them: SwanLab's run, WandB's, and MLflow's."""
    found = []
    for path in directory.glob("swanlog/*run-*/*.swanlab"):
        found.append([r.media.step for r in swanlab_records(path) if r.media.key == "val/samples"])
    for path in directory.glob("wandb/offline-run-*/*.wandb"):
        rows = [history_row(r.history.item) for r in wandb_records(path.read_bytes()) if r.HasField("history")]
        found.append([row["_step"] for row in rows if "val/samples" in row])
    return found + rounds_in_mlflow(f"sqlite:///{directory}/mlflow.db")


def swanlab_records(path: Path) -> Iterator[Any]:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    if path.stat().st_size == 0:
        return  # not even its header was flushed
    reader = DataStoreReader()
    reader.open(path)
    yield from map(Record.FromString, reader)
    reader.close()


def rounds_in_mlflow(uri: str) -> list[list[int]]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    found = []
    for run_id in (one.info.run_id for one in runs):
        tables = [file.path for file in client.list_artifacts(run_id, "val_samples") if file.path.endswith(".csv")]
        steps = [int(Path(path).stem.removeprefix("step_")) for path in tables]
        numbers = [metric.step for metric in client.get_metric_history(run_id, "val/gen/num_samples")]
        assert len(numbers) == len(set(numbers)), "a step's numbers stand twice"
        found.append(steps)
    return found


@pytest.mark.slow
def test_a_trainer_that_is_killed_in_a_round_makes_it_again_when_it_resumes(server, tmp_path, assets):
    """It is killed three times: while it gathers at step 2, writes step 3, and has written and logs step 3."""
    environment = {
        "VERL_GENERATION_MAX_NEW_TOKENS": "6", "VERL_MAX_VAL_SAMPLES": str(NUM_SAMPLES),
        "WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }  # fmt: skip
    arguments = [
        *assets.overrides(multiturn=True),
        *("trainer.test_freq=1", "trainer.save_freq=1", "trainer.resume_mode=auto"),
        *("+generation.metrics=[exact_match]", "+generation.best_metric=exact_match"),
    ]

    def start(logger: str, death: str) -> Run:
        loggers = f"trainer.logger=[console,{logger}]"
        return server.run(tmp_path, [*arguments, loggers], environment=environment, before=BEFORE + death)

    written: dict[Path, list[dict[str, Any]]] = {}
    for (logger, death), steps in zip(DEATHS, ([1], [1, 2], [1, 2, 3]), strict=True):
        killed = start(logger, death)
        assert killed.returncode == -signal.SIGKILL, killed.output[-5000:]
        assert_is_whole(killed, steps)
        assert written.items() <= step_files(killed).items()
        written = step_files(killed)

    resumed = start("mlflow", "")
    assert resumed.returncode == 0, resumed.output[-5000:]
    assert "samples at step 3 only" in resumed.output
    assert_is_whole(resumed, [1, 2, 3])
    # The third step was resumed from before it: what it wrote then is kept, beside what it wrote now.
    again = resumed.generations / "step_00000003.jsonl"
    written[resumed.generations / "old-1" / again.name] = written.pop(again)
    after = step_files(resumed)
    del after[again]
    assert after == written

    of_swanlab, of_wandb, *of_mlflow = rounds_in_trackers(tmp_path)
    assert of_swanlab in ([], [1])  # it may keep all in memory for as long as the run lasts
    assert of_wandb in ([], [2])
    assert of_mlflow in ([[], [3]], [[3], [3]])


@pytest.mark.slow
def test_a_trainer_that_is_killed_while_it_goes_on_loses_the_round_under_way_alone(server, tmp_path, assets):
    """It is killed while it trains step 3, beside the answers of step 2, whose checkpoint is there."""
    arguments = [
        *assets.overrides(multiturn=True), "+generation.overlap=true", "+generation.max_new_tokens=6",
        *("trainer.test_freq=1", "trainer.save_freq=1", "trainer.resume_mode=auto", "trainer.total_training_steps=4"),
        *("trainer.logger=[console]", "+generation.best_metric=num_new_tokens"),
        f"+trainer.max_val_samples={NUM_SAMPLES}",
    ]  # fmt: skip
    death = "killing.die_in_call('verl_valgen.rounds.proven:second_link', 2)\n"
    killed = server.run(tmp_path, arguments, before=BEFORE + death + BESIDE_TRAINING)
    assert killed.returncode == -signal.SIGKILL, killed.output[-5000:]
    assert (killed.checkpoints / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert_is_whole(killed, [1])
    written = step_files(killed)

    resumed = server.run(tmp_path, arguments)
    assert resumed.returncode == 0, resumed.output[-5000:]
    assert_is_whole(resumed, [1, 3, 4])
    assert written.items() <= step_files(resumed).items()
    assert resumed.warnings_but_late == []
    best = json.loads((resumed.generations / "best.json").read_text())
    steps = [one["step"] for one in (*best["before"], best)]
    assert steps[0] == 1
    assert steps == sorted(set(steps) & {1, 3, 4})


def step_files(result: Run) -> dict[Path, list[dict[str, Any]]]:
    """The records of all files. (A later round may have spelt what is missing in the first as an empty text.)"""
    return {
        path: [
            {name: value or None for name, value in json.loads(line).items()} for line in path.read_text().splitlines()
        ]
        for path in result.generations.rglob("step_*.jsonl")
    }


def assert_is_whole(result: Run, steps: list[int]) -> None:
    assert sorted(attempts_by_step(result.generations)) == steps
    best = json.loads((result.generations / "best.json").read_text())
    assert list(best) == ["metric", "mode", "value", "step", "before", "prompts"]
    if result.returncode == 0:
        assert list(result.generations.rglob("*.tmp")) == []


@contextlib.contextmanager
def full_disk(directory: Path) -> Iterator[None]:
    """No byte is left on the folder's file system, which is a small one."""
    fill(directory)
    yield
    make_room(directory)


@contextlib.contextmanager
def limited_files(directory: Path) -> Iterator[None]:
    """No file can grow beyond a kilobyte; Python has asked for an error in place of a signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "64k") as directory:
        yield directory


def assert_a_failing_disk_costs_its_rounds_alone(directory: Path, failing: Any, told: list[str], caplog: Any) -> None:
    best = Best(directory, METRIC, "max", 0)
    trackers = CompositeTracker({"jsonl": JsonlTracker(directory), "best.json": BestFile(best)})
    text = "So it goes. " * 1000

    def write(step: int) -> None:
        round = make_round([make_sample(step, generation=text)], step, scores={METRIC: step / 10})
        trackers.log(replace(round, numbers=best.update(round.numbers, step)))

    write(1)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with caplog.at_level(logging.WARNING), failing(directory):
        for step in (1, 2, 3, 4, 5):  # the first has a file already
            write(step)
        kept = before.keys() - ({"best.json"} - set(told))
        assert {name: (directory / name).read_bytes() for name in kept} == {name: before[name] for name in kept}
        assert {path.name for path in directory.iterdir()} - {"filler"} == before.keys()
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(" [Errno")[0] for message in messages] == [
        f"{name}: a round was not recorded: OSError:" for name in told
    ]
    write(6)
    assert {path.name for path in directory.iterdir()} == {*before, "step_00000006.jsonl", "step_00000006.numbers.json"}
    assert json.loads((directory / "best.json").read_text())["value"] == 0.6
    assert len(caplog.records) == len(told)


@pytest.mark.any_verl
def test_a_full_disk_costs_its_rounds_and_one_warning(small_disk, caplog):
    assert_a_failing_disk_costs_its_rounds_alone(small_disk, full_disk, ["jsonl", "best.json"], caplog)


@pytest.mark.any_verl
def test_files_that_cannot_grow_cost_their_rounds_and_one_warning(tmp_path, caplog):
    assert_a_failing_disk_costs_its_rounds_alone(tmp_path, limited_files, ["jsonl"], caplog)
