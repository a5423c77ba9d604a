"""What is planted as a secret does not come out, and what is planted as code does not run.

One run of verl's trainer on two ranks, with three trackers, two of which fail, own prompts and own metrics. What verl
and the trackers themselves write (checkpoints, and the trackers' folders) is theirs, and not looked at.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from end_to_end.trainer import Assets, Run, run, write_program
from trackers.destinations import make_round, make_sample

from verl_valgen.trackers.base import Tracker
from verl_valgen.trackers.composite import CompositeTracker

HERE = Path(__file__).parent

MARKER = "planted_7f3a"
CODE = (
    f"__import__('pathlib').Path('{MARKER}').touch() #"
    f" {{{{ 7 * 7 }}}} {{% set {MARKER} = 1 %}} ${{oc.env:HOME}} ${{HOME}} $(touch {MARKER}) %(x)s {{0}}"
    f" !!python/object/apply:os.system [touch {MARKER}]"
)
"""Python, Jinja, OmegaConf, shell, formats and YAML."""

PASSWORD = "of-the-address-9a41"
KEYS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "SWANLAB_API_KEY": "planted-swanlab-key-52c1",
    "MLFLOW_TRACKING_USERNAME": "planted-user",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-8d20",
    "MLFLOW_TRACKING_TOKEN": "planted-mlflow-token-11ee",
    "HF_TOKEN": "hf_plantedplantedplantedplanted",
    "JUDGE_API_KEY": "planted-judge-key-c3b7",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-key-77d4",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountKey=planted-azure-key-06b3",
}
SECRETS = [*KEYS.values(), PASSWORD]

# SwanLab's service cannot be asked whether the key is good. MLflow's run is verl's own and local, but its samples go
# to a server that does not answer, and that has its password in its address.
BEFORE = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import watching
watching.watch({MARKER!r})
import swanlab
from verl_valgen.trackers.mlflow import MlflowTracker
from verl_valgen.trackers.swanlab import SwanlabTracker

def open_elsewhere(self, max_chars, opened=MlflowTracker.__init__):
    opened(self, max_chars)
    import mlflow
    self._client = mlflow.MlflowClient(os.environ["ELSEWHERE"])

def refuse(self, round):
    raise PermissionError("401: refused " + os.environ["SWANLAB_API_KEY"])

swanlab.login = lambda *args, **kwargs: None
MlflowTracker.__init__ = open_elsewhere
SwanlabTracker.log = refuse
"""

JUDGE = """
import os

def judge(sample):
    raise RuntimeError("no answer for " + os.environ["JUDGE_API_KEY"])
"""


@dataclass(frozen=True)
class Watched:
    run: Run
    notes: list[dict[str, Any]]
    """Of `watching.py`, by rank."""


@pytest.fixture(scope="module")
def closed_port() -> Iterator[int]:
    """Of this machine; nobody else gets it, and nobody answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture(scope="module")
def watched(tmp_path_factory, assets: Assets, closed_port) -> Watched:
    directory = tmp_path_factory.mktemp("watched")
    rows = [
        {"prompt": CODE, "reference": CODE, "data_source": CODE, "extra_info": {CODE: CODE}},
        {"prompt": CODE, "generation_params": {"stop_strings": [CODE]}},
    ]
    (directory / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "judge.py").write_text(JUDGE)
    (directory / "tmp").mkdir()
    arguments = [
        *assets.overrides(multiturn=True),
        "trainer.save_freq=-1",
        "trainer.logger=[console,wandb,swanlab,mlflow]",
        "+generation.prompts=own.jsonl",
        "+generation.metrics=[exact_match, judge.py:judge]",
        "+generation.strategies={plain: {}, stopping: {stop_strings: ['{{ 7 * 7 }} {% raw %}']}}",
    ]
    environment = KEYS | {
        "VERL_GENERATION_MAX_NEW_TOKENS": "6", "VERL_SFT_LOGGING_LEVEL": "DEBUG",
        "WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
        "ELSEWHERE": f"http://planted-user:{PASSWORD}@127.0.0.1:{closed_port}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "TMPDIR": str(directory / "tmp"), "WANDB_DATA_DIR": str(directory / "wandb"),
    }  # fmt: skip
    program = write_program(directory / "program.py", "pass", before=BEFORE)
    result = run(directory, arguments, environment=environment, num_ranks=2, program=program)
    assert result.returncode == 0, result.output[-5000:]
    return Watched(result, [json.loads((directory / f"watched_{rank}.json").read_text()) for rank in range(2)])


@pytest.mark.slow
def test_no_key_is_in_what_a_run_says_and_writes(watched):
    directory = watched.run.directory
    folders = (directory / "hydra", watched.run.generations)
    paths = [directory / "stdout.txt", directory / "stderr.txt"]
    paths += [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    # Hydra's log and its three files; samples, numbers and the page's data of steps 2 and 3; runs.json; the page and
    # its list of steps.
    assert len(paths) == 2 + 4 + 6 + 1 + 2
    assert "[verl_valgen.rounds.generation][DEBUG]" in watched.run.output
    found = [(path.name, secret) for path in paths for secret in SECRETS if secret in path.read_text(errors="replace")]
    assert found == []
    # That the trackers and the metric failed, and why, is said all the same.
    assert "http://***@127.0.0.1" in watched.run.output
    assert "swanlab: a round was not recorded: PermissionError: 401: refused ***" in watched.run.output
    assert (
        "4 of 4 samples have no score (first: own.jsonl line 1): RuntimeError: no answer for ***" in watched.run.output
    )


@pytest.mark.slow
def test_what_looks_like_code_stays_text(watched):
    for step in (2, 3):
        samples = watched.run.samples(step)
        assert [sample["index"] for sample in samples] == [0, 0, 1, 1]
        assert all(CODE in sample["prompt"] and sample["prompt_text"] == CODE for sample in samples)
        assert {samples[0][name] for name in ("reference", "data_source")} == {CODE}
        of_strategy = ["{{ 7 * 7 }} {% raw %}"]
        stops = [sample["params"].get("stop_strings") for sample in samples]
        assert stops == [None, of_strategy, [CODE], of_strategy]
    assert [note for notes in watched.notes for note in notes["compiled"]] == []
    assert list(watched.run.directory.rglob(MARKER)) == []


@pytest.mark.slow
def test_rounds_unpickle_nothing(watched):
    assert [note for notes in watched.notes for note in notes["unpickled"]] == []


@pytest.mark.slow
def test_rounds_start_the_process_of_the_metrics_and_no_other(watched):
    started, of_other_rank = (notes["started"] for notes in watched.notes)
    (command,) = started
    assert command[1:3] == ["-m", "verl_valgen.scores.worker"]
    assert of_other_rank == []


@pytest.mark.slow
def test_rounds_write_into_the_folder_and_the_trackers_runs_alone(watched, closed_port):
    directory = watched.run.directory
    of_trackers = [directory / name for name in ("wandb", "swanlog", "tmp")]
    written = [Path(path) for path in watched.notes[0]["written"] if path != os.devnull]
    of_rounds = {path for path in written if path.is_relative_to(watched.run.generations)}
    kinds = ("jsonl", "numbers.json", "js")
    assert {re.sub(r"(\.\d+)?\.tmp$", "", path.name) for path in of_rounds} == {
        *("runs.json", "index.html", "steps.js"),
        *(f"step_{step:08d}.{kind}" for step in (2, 3) for kind in kinds),
    }
    elsewhere = set(written) - of_rounds
    assert [path for path in elsewhere if not any(map(path.is_relative_to, of_trackers))] == []
    assert watched.notes[1]["written"] == []

    # Other addresses are names of sockets in the file system: of WandB's own process.
    reached = {tuple(address) for notes in watched.notes for address in notes["connected"] if isinstance(address, list)}
    assert reached == {("127.0.0.1", closed_port)}


@pytest.mark.any_verl
def test_a_failing_tracker_does_not_tell_its_key(monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEYS["WANDB_API_KEY"])

    class Refused(Tracker):
        def log(self, round):
            raise PermissionError(f"wandb login --host=https://api:{PASSWORD}@host {KEYS['WANDB_API_KEY']}")

    with caplog.at_level(logging.DEBUG):
        CompositeTracker({"wandb": Refused()}).log(make_round([make_sample()], 1))
    (record,) = caplog.records
    assert record.getMessage().endswith("PermissionError: wandb login --host=https://***@host ***")
