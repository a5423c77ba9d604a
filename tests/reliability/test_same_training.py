"""Training is bit for bit the same, whether something is generated or not.

Runs with generation off, greedy and sampling, seeded alike, with rounds before training and at every step; in one way
training goes on meanwhile, and verl saves a checkpoint during a round. All that a run leaves is compared: what it logs,
parameters, optimizer, data loader and random states; also after it was stopped at a checkpoint and went on from there.
Without adapters the model has attention dropout, which draws random numbers. The tour (`end_to_end/test_tour.py`) has
one case more.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from end_to_end.server import TrainerServer
from end_to_end.trainer import Assets, Run, strategy
from reliability.conftest import IS_WHOLE
from same_training import SEED_AND_REPORT, assert_checkpoints_differ, assert_same_training

pytestmark = pytest.mark.slow

STEPS, STOPPED_AT = 4, 2
GENERATION = ["+generation.before_train=true", "+generation.max_new_tokens=6"]
WAYS = {
    "greedy": ["+generation.do_sample=false"],
    "sampling": ["+generation.n=2"],
    "sharded": ["+generation.n=2", "+generation.gather=sharded"],
    "overlap": ["+generation.n=2", "+generation.overlap=true", "++generation.max_new_tokens=24"],
}
"""The first two with a copy, the third through the modules that are trained, the last while training goes on."""

BESIDE_TRAINING = """
import threading
from pathlib import Path
from verl_valgen.backends.hf import HFBackend
from verl_valgen.hosts.loaders import CountingLoader

def answer_while_the_next_step_is_trained():
    begun = {}  # by step
    loaders = []
    generate, train = HFBackend.generate, CountingLoader.__iter__

    def begins(step):
        return begun.setdefault(step, threading.Event())

    def answer(self, requests):
        if threading.current_thread() is threading.main_thread():
            return generate(self, requests)
        step = loaders[0].count
        assert begins(step + 1).wait(100), "training waits"
        with Path("beside_training.txt").open("a") as file:
            print(step, file=file)
        return generate(self, requests)

    def train_and_tell(self):
        loaders[:] = [self]
        for batch in train(self):
            begins(self.count).set()
            yield batch

    HFBackend.generate, CountingLoader.__iter__ = answer, train_and_tell

answer_while_the_next_step_is_trained()
"""
"""Answers begin when the next step is trained, and so behind the checkpoint of their own."""

ALL = list(itertools.product(("fsdp", "fsdp2"), (1, 2), (False, True)))
CASES = [case for case in ALL if IS_WHOLE or sum((case[0] == "fsdp", case[1] == 1, case[2])) % 2 == 0]
"""Of three things with two values each, half of all cases have every pair."""


@dataclass(frozen=True)
class Training:
    """What all runs of a case have in common."""

    server: TrainerServer
    assets: Assets
    fsdp: str
    num_ranks: int
    lora: bool
    ways: Sequence[str]
    overrides: Sequence[str] = ()
    before: str = ""


def train(training: Training, directory: Path, generation: Sequence[str]) -> Run:
    result = training.server.run(
        directory,
        [
            *training.assets.overrides(multiturn=True), strategy(training.fsdp), *training.overrides, *generation,
            *(["model.lora_rank=4"] if training.lora else []), f"trainer.total_training_steps={STEPS}",
            "trainer.test_freq=1", f"trainer.save_freq={STOPPED_AT}", "trainer.resume_mode=auto",
        ],
        num_ranks=training.num_ranks,
        before=SEED_AND_REPORT + training.before + (BESIDE_TRAINING if generation else ""),
    )  # fmt: skip
    assert result.returncode == 0, result.output[-5000:]
    return result


def resumed(training: Training, first: Run, generation: Sequence[str]) -> Run:
    """The run again, as if it had been stopped at its first checkpoint."""
    directory = first.directory.with_name(f"{first.directory.name}-resumed")
    step = f"global_step_{STOPPED_AT}"
    shutil.copytree(first.checkpoints / step, directory / "checkpoints" / step)
    (directory / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(STOPPED_AT))
    return train(training, directory, generation)


def name_of(case: Any) -> str:
    return f"{case[0]}-{case[1]}-{'lora' if case[2] else 'full'}"


def ways_of(case: Any) -> list[str]:
    """All, or two, so that the cases have every pair of a way and what else there is."""
    _, num_ranks, lora = case
    if IS_WHOLE:
        return list(WAYS)
    return ["greedy", "overlap"] if num_ranks == 1 else ["sharded", "greedy" if lora else "overlap"]


def with_dropout(assets: Assets, directory: Path) -> Assets:
    """The same model with attention dropout."""
    shutil.copytree(assets.directory, directory)
    path = directory / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.1}))
    return Assets(directory)


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def runs(request, server, tmp_path_factory, assets) -> Iterator[dict[str, tuple[Run, Run]]]:
    directory = tmp_path_factory.mktemp("same")
    if not request.param[2]:
        assets = with_dropout(assets, directory / "assets")
    yield from runs_of(Training(server, assets, *request.param, ways_of(request.param)), directory)


def runs_of(training: Training, directory: Path) -> Iterator[dict[str, tuple[Run, Run]]]:
    """By way ("off" among them) the whole run, and its second half after a stop."""
    found = {}
    for way in ("off", *training.ways):
        generation = [] if way == "off" else [*GENERATION, *WAYS[way]]
        whole = train(training, directory / way, generation)
        found[way] = (whole, resumed(training, whole, generation))
    yield found
    shutil.rmtree(directory)


@pytest.mark.parametrize("half", [0, 1], ids=["whole", "resumed"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_that_a_run_leaves_differs(runs, way, half):
    if way not in runs:
        pytest.skip("a part of the ways is tried")
    on, off = runs[way][half], runs["off"][half]
    assert on.warnings_but_late == []
    assert [path.name for path in sorted(on.generations.glob("step_*.jsonl"))] == [
        f"step_{step:08d}.jsonl" for step in ((0, 1, 2, 3, 4) if half == 0 else (2, 3, 4))
    ]
    beside = on.directory / "beside_training.txt"
    assert beside.exists() == (way == "overlap")
    if way == "overlap":  # all rounds but those before training and behind it
        assert beside.read_text().split() == (["1", "2", "3"] if half == 0 else ["3"])
    assert not off.generations.exists()
    assert_same_training(on, off, last_step=STEPS, num_steps=STEPS // (1 + half), num_validations=STEPS // (1 + half))


def test_what_is_compared_differs_between_steps(runs):
    """Else nothing has been shown."""
    whole, _ = runs["off"]
    assert_checkpoints_differ(whole, STOPPED_AT, STEPS)
