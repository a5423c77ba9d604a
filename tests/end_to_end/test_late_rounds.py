"""Rounds whose answers come when the trainer is a step ahead, in every tracker that there is: nothing is lost, nothing
stands twice, and verl's own numbers are as they are without."""

from __future__ import annotations

import json

import pytest
from end_to_end.test_tour_samples import held_by_trackers
from end_to_end.test_training_goes_on import ANSWERS_WAIT_FOR_TRAINING
from end_to_end.tour import TRACKERS
from end_to_end.trainer import GENERATION_CONFIG, Run
from same_training import SEED_AND_REPORT

pytestmark = pytest.mark.slow

STEPS = [1, 2, 3, 4]
LATE = [1, 2, 3]
BEST = "num_new_tokens"
OF_VERL = ("train/loss", "val/loss")


@pytest.fixture(scope="module")
def late(server, tmp_path_factory, assets) -> Run:
    """Round n is recorded when step n + 1 is trained and logged, and its validation begins."""
    directory = tmp_path_factory.mktemp("late")
    result = server.run(
        directory,
        [
            *GENERATION_CONFIG, *assets.overrides(), f"trainer.logger=[console{TRACKERS}]", "trainer.test_freq=1",
            f"trainer.total_training_steps={STEPS[-1]}", "generation.overlap=true", "generation.max_new_tokens=20",
            f"generation.best_metric={BEST}", "generation.best_mode=min",
        ],
        environment={
            "WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
            "TRACKIO_DIR": f"{directory}/trackio",
        },
        before=SEED_AND_REPORT + ANSWERS_WAIT_FOR_TRAINING,
    )  # fmt: skip
    assert result.returncode == 0, result.output[-5000:]
    return result


def test_the_rounds_are_late(late):
    for step in LATE:
        assert late.stdout.count(f"answers of step {step} after a step of training") == 1
    blocks = [late.stdout.index(f"=== Validation Samples (Step {step}) ===") for step in STEPS]
    assert blocks == sorted(blocks)
    assert all(f"\nstep:{step + 1} - " in late.stdout[: blocks[step - 1]] for step in LATE)


def test_every_tracker_has_every_round_once_with_its_own_step(late):
    held = held_by_trackers(late, STEPS)
    assert held.keys() == {name for name in TRACKERS.split(",") if name}
    for name, rows in held.items():
        own_steps = []
        for row, values in rows.items():
            if "val/gen/num_samples" not in values:
                continue
            step = values.get("val/samples_step", row)
            own_steps.append(step)
            numbers = json.loads((late.generations / f"step_{step:08d}.numbers.json").read_text())["numbers"]
            found = {key.removeprefix("val/gen/"): value for key, value in values.items() if key.startswith("val/gen/")}
            assert found == pytest.approx(numbers, rel=1e-5), (name, step)
            if "val/samples" in values and "columns" in values["val/samples"]:
                table = values["val/samples"]
                answers = [row[table["columns"].index("generation")] for row in table["data"]]
                if name in ("wandb", "swanlab", "mlflow"):
                    assert answers == [sample["generation"] for sample in late.samples(step)], (name, step)
        assert sorted(own_steps) == STEPS, name


def test_verls_own_numbers_are_in_their_rows(late):
    for name, rows in held_by_trackers(late, STEPS).items():
        for key in OF_VERL:
            logged = [rows.get(step, {}).get(key) for step in STEPS]
            assert logged == pytest.approx([float(value) for value in late.logged(key)], abs=1e-3), (name, key)


def test_the_best_value_is_that_of_all_rounds(late):
    values = [
        json.loads((late.generations / f"step_{step:08d}.numbers.json").read_text())["numbers"][BEST] for step in STEPS
    ]
    best = json.loads((late.generations / "best.json").read_text())
    of_steps = [*best["before"], {"value": best["value"], "step": best["step"]}]
    expected = [
        {"value": value, "step": step} for step, value in zip(STEPS, values, strict=True)
        if value < min(values[: step - 1], default=float("inf"))
    ]  # fmt: skip
    assert of_steps == expected
