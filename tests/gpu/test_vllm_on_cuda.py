"""`generation.backend=vllm` with verl's trainer on two GPUs that hold the model together: every round is proved, greedy
answers are those of the round's weights, and training is bit for bit the same, deterministic algorithms and all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from end_to_end.trainer import HAS_ENGINES, Assets, Run, strategy
from gpu.conftest import SDPA, make_assets, needs_two
from gpu.near_ties import MAX_ULP
from gpu.test_trainers import answers_ulp_below_the_best, trained_model
from same_training import SEED_AND_REPORT, assert_checkpoints_differ, assert_same_training

pytestmark = [
    needs_two,
    pytest.mark.skipif(not HAS_ENGINES, reason="vLLM does not run with this verl's transformers"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

STEPS = 3
"""With a round, a validation and a checkpoint at each."""
GENERATION = [
    "+generation.backend=vllm", "+generation.tensor_parallel=2", "+generation.max_new_tokens=24",
    "+generation.strategies={greedy: {do_sample: false}, hot: {do_sample: true}}", "+trainer.max_val_samples=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Assets:
    return make_assets(tmp_path_factory, "for_vllm", num_hidden_layers=6)


def train(server: Any, directory: Path, assets: Assets, generation: list[str]) -> Run:
    result = server.run(
        directory,
        [
            *assets.overrides(multiturn=True), strategy("fsdp2"), *SDPA, "optim.lr=3e-5",
            *generation, f"trainer.total_training_steps={STEPS}", "trainer.total_epochs=100",
            "trainer.test_freq=1", "trainer.save_freq=1",
        ],
        num_ranks=2,
        before=SEED_AND_REPORT,
    )  # fmt: skip
    assert result.returncode == 0, result.output[-8000:]
    return result


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory, assets) -> dict[str, Run]:
    return {
        name: train(server, tmp_path_factory.mktemp(name), assets, generation)
        for name, generation in (("off", []), ("vllm", GENERATION))
    }


def test_every_round_is_proved(runs):
    assert runs["vllm"].warnings_but_late == []
    for step in range(1, STEPS + 1):
        assert {sample["verified"] for sample in runs["vllm"].samples(step)} == {True}


def test_greedy_is_that_of_the_plain_model(runs, assets):
    model = trained_model(runs["vllm"], assets, lora=False)
    worst = answers_ulp_below_the_best(runs["vllm"], assets, model, strategy_name="greedy")
    assert max(worst) <= MAX_ULP, worst


def test_nothing_that_training_leaves_differs(runs):
    assert_checkpoints_differ(runs["off"], 1, STEPS)
    for step in (1, STEPS):
        assert_same_training(runs["vllm"], runs["off"], last_step=step, num_steps=STEPS, num_validations=STEPS)
