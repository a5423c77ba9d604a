"""Runs that go on from a checkpoint: steps, samples and the best value count on."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from end_to_end.trainer import GENERATION_CONFIG

from verl_valgen.hosts.schedule import Schedule

pytestmark = pytest.mark.slow

GREEDY = {"VERL_GENERATION_DO_SAMPLE": "false", "VERL_GENERATION_MAX_NEW_TOKENS": "8"}


def test_resuming_counts_on_and_sets_samples_of_a_longer_run_aside(server, tmp_path, assets):
    arguments = [*assets.overrides(multiturn=True), "trainer.test_freq=1"]
    first = server.run(tmp_path, arguments, environment=GREEDY)
    assert first.returncode == 0, first.output[-5000:]
    stale = first.generations / "step_00000009.jsonl"
    stale.write_text(json.dumps({"from": "a longer run"}) + "\n")
    before = (first.generations / "step_00000003.jsonl").read_bytes()
    second = server.run(tmp_path, [*arguments, "trainer.total_training_steps=5"], environment=GREEDY)
    assert second.returncode == 0, second.output[-5000:]
    assert sorted(path.name for path in second.generations.glob("*.jsonl")) == [
        f"step_{step:08d}.jsonl" for step in range(1, 6)
    ]
    assert (second.generations / "step_00000003.jsonl").read_bytes() == before
    assert (second.generations / "old-1" / stale.name).exists()
    assert second.samples(5)[0]["step"] == 5
    assert str(Schedule(3, 5, 5, 1)) in second.output


def test_other_rows_after_a_stop_at_an_epochs_end(server, tmp_path, assets):
    """verl's part of the rows is drawn without a seed; its restored loader gives nothing in the epoch that follows."""
    kind = assets.directory / "multiturn"
    pd.read_parquet(kind / "train.parquet").iloc[:8].to_parquet(tmp_path / "train.parquet")
    rows = pd.concat([pd.read_parquet(kind / "val.parquet")] * 2, ignore_index=True)
    rows["data_source"] = [str(row) for row in rows.index]
    rows.to_parquet(tmp_path / "val.parquet")
    overrides = [
        *GENERATION_CONFIG, *assets.overrides(multiturn=True),
        f"data.train_files={tmp_path}/train.parquet", f"data.val_files={tmp_path}/val.parquet",
        "data.train_batch_size=4", "data.micro_batch_size_per_gpu=2", "data.val_max_samples=16", "+data.shuffle=true",
        "trainer.test_freq=1", "trainer.save_freq=2", "trainer.total_epochs=3", "trainer.resume_mode=auto",
        "generation.do_sample=false", "generation.max_new_tokens=2", "generation.best_metric=num_new_tokens",
    ]  # fmt: skip
    first = server.run(tmp_path, [*overrides, "trainer.total_training_steps=2"])
    assert first.returncode == 0, first.output[-5000:]
    assert {sample["row"] for sample in first.samples(2)} - set(range(16))  # of all forty
    second = server.run(tmp_path, [*overrides, "trainer.total_training_steps=null"])
    assert second.returncode == 0, second.output[-5000:]
    for samples in (first.samples(2), second.samples(4)):
        assert [(str(s["row"]), s["file"]) for s in samples] == [(s["data_source"], None) for s in samples]

    assert "5 samples at steps 3 and 4, in" in second.output
    assert "so that training ends at step 4 and not at 6" in second.output
    assert [path.name for path in sorted(second.generations.glob("step_*.jsonl"))][-1] == "step_00000004.jsonl"
    (warning,) = second.warnings
    assert warning.startswith("the prompts are others than before: what was recorded up to step 2 is of other prompts")
    best = json.loads((second.generations / "best.json").read_text())
    assert (best["step"], best["before"]) == (3, [])  # of equally good ones the first that is of these prompts
    assert (second.generations / "old-1" / "best.json").exists()


def test_first_turns_of_some_validations_and_on_after_a_stop(server, tmp_path, assets):
    """`turn`, `every` and the best value over a resumed run; own prompts in place of the data's."""
    (tmp_path / "own.txt").write_text("1+1?\n2+2?\n")
    overrides = [
        *GENERATION_CONFIG, *assets.overrides(multiturn=True), "trainer.test_freq=1", "trainer.save_freq=2",
        "generation.do_sample=false", "generation.max_new_tokens=4", "generation.every=2", "generation.turn=all",
        "generation.best_metric=num_new_tokens", "trainer.max_val_samples=8", "trainer.total_epochs=2",
    ]  # fmt: skip
    first = server.run(tmp_path, [*overrides, "trainer.total_training_steps=4"])
    assert first.returncode == 0, first.output[-5000:]
    assert "samples at steps 2 and 4, in" in first.output
    assert sorted(path.name for path in first.generations.glob("step_*.jsonl")) == [
        f"step_{s:08d}.jsonl" for s in (2, 4)
    ]
    rows = [sample["row"] for sample in first.samples(4)]
    assert len(rows) > len(set(rows)) == 8  # every third conversation has two turns
    best = json.loads((first.generations / "best.json").read_text())

    own = ["generation.prompts=own.txt", "trainer.total_training_steps=6", "trainer.resume_mode=auto"]
    second = server.run(tmp_path, [*overrides, *own])
    assert second.returncode == 0, second.output[-5000:]
    assert [(s["row"], s["prompt_text"], s["reference"]) for s in second.samples(6)] == [
        (None, "1+1?", None),
        (None, "2+2?", None),
    ]
    after = json.loads((second.generations / "best.json").read_text())
    assert after["value"] >= best["value"]
    assert after["step"] in (best["step"], 6)
