"""Training on two GPUs is bit for bit the same while answers are made beside it: with attention dropout, which draws
from the generator that a capture takes hold of; with deterministic kernels; with a fault in the thread; and where the
trainer empties the allocator's cache meanwhile."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from end_to_end.trainer import Assets, Run, strategy
from gpu.conftest import HARD_CODED_ATTENTION_TO_SDPA, SDPA, make_assets, needs_two
from same_training import SEED_AND_REPORT, assert_checkpoints_differ, assert_same_training

pytestmark = [needs_two, pytest.mark.slow]

STEPS, EVERY = 24, 8
BESIDE = [8, 16]
"""Steps of the rounds that training goes on beside: after the last there is none."""

NOTE_STEPS_BESIDE = """
import threading
from pathlib import Path
from verl_valgen.backends.fast.backend import FastBackend
from verl_valgen.hosts.loaders import CountingLoader

loaders = []

def note_steps():
    train = CountingLoader.__iter__

    def train_and_note(self):
        loaders[:] = [self]
        yield from train(self)

    CountingLoader.__iter__ = train_and_note

    def generate(self, requests, original=FastBackend.generate):
        step = loaders[0].count if loaders else 0
        answers = original(self, requests)
        if threading.current_thread() is not threading.main_thread():
            with Path("beside_training.txt").open("a") as file:
                print(step, loaders[0].count - step, file=file)
        return answers

    FastBackend.generate = generate

note_steps()
"""
"""Notes the step at which answers began beside training, and how many steps of it began meanwhile."""

EMPTY_CACHE_AND_FAIL = """
def empty_cache_and_fail():
    import torch
    train = CountingLoader.__iter__

    def train_and_empty(self):
        for batch in train(self):
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            yield batch

    CountingLoader.__iter__ = train_and_empty

    def generate(self, requests, original=FastBackend.generate):
        if loaders and loaders[0].count == 8 and threading.current_thread() is not threading.main_thread():
            raise RuntimeError("planted beside training")
        return original(self, requests)

    FastBackend.generate = generate

empty_cache_and_fail()
"""


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Assets:
    assets = make_assets(tmp_path_factory, "with_dropout", num_hidden_layers=6)
    path = assets.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.1}))
    return assets


def train(server: Any, directory: Path, assets: Assets, generation: list[str], before: str) -> Run:
    result = server.run(
        directory,
        [
            *assets.overrides(multiturn=True), strategy("fsdp2"), *SDPA,
            *generation, f"trainer.total_training_steps={STEPS}", "trainer.total_epochs=100",
            f"trainer.test_freq={EVERY}", f"trainer.save_freq={STEPS // 2}",
        ],
        num_ranks=2,
        before=SEED_AND_REPORT + HARD_CODED_ATTENTION_TO_SDPA + before,
    )  # fmt: skip
    assert result.returncode == 0, result.output[-5000:]
    return result


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory, assets) -> dict[str, Run]:
    generation = ["+generation.overlap=true", "+generation.max_new_tokens=384", "+generation.eos_token_id=0"]
    found = {}
    for name, given, before in (
        ("off", [], ""),
        ("first", generation, NOTE_STEPS_BESIDE),
        ("second", generation, NOTE_STEPS_BESIDE),
        ("faulty", generation, NOTE_STEPS_BESIDE + EMPTY_CACHE_AND_FAIL),
    ):
        found[name] = train(server, tmp_path_factory.mktemp(name), assets, given, before)
    return found


def test_checkpoints_differ_between_steps(runs):
    assert_checkpoints_differ(runs["off"], STEPS // 2, STEPS)


@pytest.mark.parametrize("name", ["first", "second", "faulty"])
def test_nothing_that_training_leaves_differs(runs, name):
    for step in (STEPS // 2, STEPS):
        assert_same_training(runs[name], runs["off"], last_step=step, num_steps=STEPS, num_validations=STEPS // EVERY)


@pytest.mark.parametrize("name", ["first", "second"])
def test_steps_were_trained_beside_the_answers(runs, name):
    beside = [list(map(int, line.split())) for line in (runs[name].directory / "beside_training.txt").open()]
    assert [step for step, _ in beside] == BESIDE
    print(name, beside)
    assert all(num_steps > 1 for _, num_steps in beside)
    assert runs[name].warnings_but_late == []
    for step in (*BESIDE, STEPS):
        assert {sample["verified"] for sample in runs[name].samples(step)} == {True}
        assert runs[name].samples(step) == runs["first"].samples(step)


def test_a_fault_in_the_thread_costs_its_round_and_a_warning(runs):
    faulty = runs["faulty"]
    (warning,) = faulty.warnings
    assert re.search("no samples of the validation at step 8: .*planted beside training", warning)
    assert [path.name for path in sorted(faulty.generations.glob("step_*.jsonl"))] == [
        f"step_{step:08d}.jsonl" for step in (16, 24)
    ]
    assert faulty.samples(16) == runs["first"].samples(16)
