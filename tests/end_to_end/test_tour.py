"""The tour: training is the same to the bit with generation and without, and answers are those of the trained model."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
from checkpoints import assert_greedy_samples, plain_model
from end_to_end.test_tour_samples import held_by_trackers
from end_to_end.tour import LORA, NUM_PROMPTS, ROUNDS, SAMPLED, STEPS, STOPPED_AT, Tour
from end_to_end.trainer import HAS_ENGINES, TRAINER_NAME, Run, shown_lines
from same_training import assert_checkpoints_differ, assert_same_training
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_valgen.__main__ import main

pytestmark = pytest.mark.xdist_group("tour")


def test_nothing_that_training_leaves_differs(tour: Tour):
    """Logs, parameters, optimizer, data loader and random states; whole, and resumed in the middle."""
    assert_same_training(tour.on, tour.off, last_step=STEPS, num_steps=STEPS, num_validations=2)
    assert_same_training(tour.on_resumed, tour.off_resumed, last_step=STEPS, num_steps=2, num_validations=1)


def test_what_is_compared_differs_between_steps(tour: Tour):
    assert_checkpoints_differ(tour.off, STOPPED_AT, STEPS)


def observed(run: Run, key: str) -> list[list[str]]:
    """What each rank saw at its end."""
    return [json.loads((run.directory / f"observed_{rank}.json").read_text())[key] for rank in range(2)]


def test_off_means_that_verls_own_class_trains_and_nothing_that_generates_is_loaded(tour: Tour):
    assert [trainer[:3] for trainer in observed(tour.on, "trainer")] == [
        [TRAINER_NAME, "ValidationGenerationMixin", TRAINER_NAME]
    ] * 2
    assert observed(tour.off, "trainer") == [[TRAINER_NAME, "object"]] * 2
    used = ("mixin", "prompts", "rounds", "weights", "backends.hf", "backends.sampling", "scores", "trackers")
    assert {f"verl_valgen.{name}" for name in used} <= set(observed(tour.on, "loaded")[0])
    for loaded in observed(tour.off, "loaded"):
        assert [name for name in loaded if name.removeprefix("verl_valgen.").startswith(used)] == []
    assert not tour.off.generations.exists()
    assert "Validation Samples" not in tour.off.output
    assert tour.off.warnings == []
    # verl's own values, and no others.
    for history in held_by_trackers(tour.off, steps=()).values():
        keys = {key for values in history.values() for key in values}
        assert "val/loss" in keys
        assert not any(key.startswith(("val/gen", "val/sample")) for key in keys)


def test_the_rounds_have_the_first_rows_of_rank_0_and_the_own_prompts(tour: Tour, assets):
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    frame = pd.read_parquet(tour.on.directory / "val.parquet")
    expected = []
    for row in (0, 2, 4):  # rank 0 of two has every second row
        if HAS_ENGINES:
            *before, answer = list(frame["messages"].iloc[row])
            expected.append((row, before, answer["content"]))
        else:
            before = [{"role": "user", "content": frame["question"].iloc[row]}]
            expected.append((row, before, frame["answer"].iloc[row]))
    for question, reference in (("Name the capital of France.", None), ("1+1?", "2")):
        expected.append((None, [{"role": "user", "content": question}], reference))
    for step in ROUNDS:
        prompts = {(s["index"], s["row"], s["prompt"], s["prompt_text"], s["reference"]) for s in tour.on.samples(step)}
        assert prompts == {
            (
                index,
                row,
                tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True),
                before[-1]["content"],
                reference,
            )
            for index, (row, before, reference) in enumerate(expected)
        }


@pytest.mark.parametrize("step", ROUNDS)
def test_greedy_answers_are_those_of_a_plain_model(tour: Tour, assets, step):
    """Before training of the one on the disk, then of the checkpoint with the same weights."""
    if step == 0:
        model = AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32).eval()
    else:
        model = plain_model(tour.on.checkpoints / f"global_step_{step}", assets.model, LORA)
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    samples = [sample for sample in tour.on.samples(step) if sample["strategy"] == "greedy"]
    assert len(samples) == 5
    for sample in samples:
        assert_greedy_samples([sample], model, tokenizer, sample["params"]["max_new_tokens"])


def test_the_answers_change_as_the_model_learns(tour: Tour):
    texts = [tuple(sample["generation"] for sample in tour.on.samples(step)) for step in ROUNDS]
    assert len(set(texts)) == len(texts)


def test_the_console_shows_every_prompt_with_an_answer_of_each_strategy(tour: Tour):
    for step in ROUNDS:
        samples = tour.on.samples(step)
        lines = [f"=== Validation Samples (Step {step}) ==="]
        for index in range(NUM_PROMPTS):
            of_prompt = [sample for sample in samples if sample["index"] == index]
            lines += shown_lines([sample for sample in of_prompt if sample["completion"] == 0], has_strategies=True)
        num_more = sum(sample["completion"] > 0 for sample in samples)
        lines.append(f"... {num_more} more in checkpoints/generations/step_{step:08d}.jsonl")
        assert num_more == NUM_PROMPTS * len(SAMPLED)
        assert "\n".join(lines) + "\n" in tour.on.stdout
        own = [line for line in lines if line.startswith("Source ")][-2:]
        assert own == ["Source 4: own.jsonl line 1", "Source 5: own.jsonl line 2"]


def test_a_run_writes_the_page_that_its_files_give(tour: Tour, tmp_path):
    for run, name in ((tour.on, "whole"), (tour.on_resumed, "resumed")):
        folder = tmp_path / name / "checkpoints" / "generations"
        shutil.copytree(run.generations, folder, ignore=shutil.ignore_patterns("data", "index.html"))
        assert main(["page", str(folder.parent)]) == 0
        made, written = (
            {path.name: path.read_bytes() for path in (*of.glob("data/*"), of / "index.html")}
            for of in (folder, run.generations)
        )
        assert written == made
        assert sorted(made) == ["index.html", *(f"step_{step:08d}.js" for step in ROUNDS), "steps.js"]


def test_a_resumed_run_makes_its_rounds_again_and_sets_later_ones_aside(tour: Tour):
    whole, resumed = tour.on, tour.on_resumed
    names = [f"step_{step:08d}.jsonl" for step in ROUNDS]
    assert sorted(path.name for path in resumed.generations.glob("step_*.jsonl")) == names
    # What lies before the checkpoint stays; what lies beyond it belongs to another run, and the same is said again.
    assert [path.name for path in (resumed.generations / "old-1").glob("*.jsonl")] == names[-1:]
    for name in names:
        assert (resumed.generations / name).read_bytes() == (whole.generations / name).read_bytes()
    assert (resumed.generations / "old-1" / names[-1]).read_bytes() == (whole.generations / names[-1]).read_bytes()
    best = [json.loads((run.generations / "best.json").read_text()) for run in (whole, resumed)]
    assert best[0] == best[1]
    assert " at steps 2 and 4, in checkpoints/generations" in resumed.output
    assert "samples of an earlier run beyond step 2 were moved to checkpoints/generations/old-1" in resumed.output
