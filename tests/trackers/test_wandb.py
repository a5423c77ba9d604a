"""What is peculiar to WandB: rows that close, steps that only grow."""

from __future__ import annotations

import pytest
from destinations import make_round, make_run, make_sample

from verl_valgen.trackers.wandb import WandbTracker


@pytest.fixture
def wandb_run(open_destination):
    return open_destination("wandb")


def test_what_the_trainer_logs_afterwards_is_kept(wandb_run):
    for step in (5, 6):
        wandb_run.run.log({"train/loss": 1.0}, step=step)
        wandb_run.tracker.log(make_round([make_sample(step)], step, scores={"exact": 0.5}))
        wandb_run.run.log({"val/loss": 2.0}, step=step)
    rounds = wandb_run.read()
    for step in (5, 6):
        assert rounds[step].rows[0]["generation"] == f"answer 0 at {step}"
        values = rounds[step].values
        assert (values["train/loss"], values["val/gen/exact"], values["val/loss"]) == (1.0, 0.5, 2.0)


def test_late_round_joins_the_open_row_and_leaves_it_open(wandb_run):
    wandb_run.run.log({"train/loss": 1.0}, step=7)
    wandb_run.tracker.log(make_round([make_sample(6)], 6, scores={"exact": 0.5}))
    wandb_run.run.log({"val/loss": 2.0}, step=7)
    found = wandb_run.read()[7]
    assert found.rows[0]["step"] == 6
    values = found.values
    assert (values["train/loss"], values["val/gen/exact"], values["val/loss"]) == (1.0, 0.5, 2.0)


def test_close_leaves_the_run_open(wandb_run):
    wandb_run.tracker.close()
    assert WandbTracker.is_live(make_run())
    wandb_run.run.finish()
    assert not WandbTracker.is_live(make_run())
    with pytest.raises(RuntimeError, match="no live run"):
        WandbTracker(make_run(max_chars=100))
