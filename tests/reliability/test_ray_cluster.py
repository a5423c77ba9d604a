"""Ray itself: a worker dies in a round; a cluster was there before, without our variables. With `make reliability`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from end_to_end.clusters import Cluster, own_cluster
from end_to_end.trainer import (
    HAS_ENGINES,
    HAS_RAY,
    IN_ITS_FOLDER,
    RAY,
    TIMEOUT_S,
    Assets,
    Run,
    environment_of_a_run,
    run,
    strategy,
)
from reliability.conftest import IS_WHOLE, record_figure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(not IS_WHOLE, reason="a cluster takes minutes: make reliability"),
    pytest.mark.skipif(not (HAS_RAY and HAS_ENGINES), reason="this verl has no verl.trainer.sft_trainer_ray"),
]

GREEDY = {"VERL_GENERATION_DO_SAMPLE": "false", "VERL_GENERATION_MAX_NEW_TOKENS": "4", "VERL_MAX_VAL_SAMPLES": "3"}
MAX_END_S = 30.0
"""That a run may take to end whose worker is dead, by promise."""

# Python runs it when it starts: here in the driver, in whatever Ray starts, and in workers, which know their rank.
DEATH = """
import os

if os.environ.get("RANK") == "1":
    import signal, time
    from verl_valgen.rounds import proven

    begin, rounds = proven.ProvenAnswerer.begin, []

    def die_in_the_second_round(self, *args):
        rounds.append(time.time())
        if len(rounds) == 2:
            open("died_at.txt", "w").write(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(self, *args)

    proven.ProvenAnswerer.begin = die_in_the_second_round
"""


def overrides(assets: Assets, *more: str) -> list[str]:
    return [*assets.overrides(), strategy("fsdp2"), "trainer.n_gpus_per_node=2", "trainer.test_freq=1", *more]


def run_until_it_ends(directory: Path, arguments: list[str], cluster: Cluster) -> tuple[Run, float]:
    """The run, and when its driver was gone."""
    command = [sys.executable, "-m", RAY, *arguments, *IN_ITS_FOLDER]
    search = os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])
    environment = environment_of_a_run(GREEDY | cluster.environment | {"PYTHONPATH": search})
    with (directory / "stdout.txt").open("w") as stdout, (directory / "stderr.txt").open("w") as stderr:
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=stdout, stderr=stderr)
        try:
            status = process.wait(TIMEOUT_S)
        finally:
            process.kill()
    ended_at = time.time()
    output = [(directory / name).read_text(errors="replace") for name in ("stdout.txt", "stderr.txt")]
    return Run(directory, status, *output), ended_at


def test_a_worker_that_is_killed_in_a_round_ends_the_run(tmp_path, assets):
    """Verl could not go on with the others: so nobody is told that training goes on, and nobody waits."""
    (tmp_path / "sitecustomize.py").write_text(DEATH)
    with own_cluster() as cluster:
        result, ended_at = run_until_it_ends(tmp_path, overrides(assets), cluster)
        assert result.returncode == 1, result.output[-5000:]
        seconds = ended_at - float((tmp_path / "died_at.txt").read_text())
        record_figure("a worker of Ray is killed in a round", seconds_to_the_end=seconds)
        assert seconds < MAX_END_S
        assert cluster.left_over() == []
    assert "ActorDiedError" in result.stderr
    assert "training goes on" not in result.output
    assert len(result.samples(1)) == 3
    assert [path.name for path in result.generations.glob("step_*.jsonl")] == ["step_00000001.jsonl"]
    assert len(result.logged("train/loss")) == 2


def test_the_drivers_settings_reach_the_workers_of_a_cluster_that_was_there(tmp_path, assets):
    with own_cluster() as cluster:
        address = cluster.start(2, {})
        environment = GREEDY | cluster.environment | {"RAY_ADDRESS": address}
        last = ["trainer.total_training_steps=2", "trainer.test_freq=-1"]
        result = run(tmp_path, overrides(assets, *last), environment=environment, module=RAY)
        assert result.returncode == 0, result.output[-5000:]
        names = {re.sub(r"\W.*", "", process.name()) for process in cluster.processes()}
        assert {"raylet", "gcs_server"} <= names, "the cluster is not the run's own, and outlives it"
    samples = result.samples(2)
    assert [(sample["row"], sample["verified"]) for sample in samples] == [(0, True), (1, True), (2, True)]
    assert all(sample["params"] == {"do_sample": False, "max_new_tokens": 4, "dtype": "float32"} for sample in samples)
    assert result.warnings_but_late == []
