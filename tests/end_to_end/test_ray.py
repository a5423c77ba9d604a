"""`verl.trainer.sft_trainer_ray`: the driver asks and records, its workers answer. The workers are forks, not Ray's."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest
import torch
from checkpoints import assert_greedy_samples, assert_nearly_greedy_samples, plain_greedy, plain_model
from end_to_end.ray_runs import (
    MAX_NEW_TOKENS,
    NUM_ROWS,
    NUM_WORKERS,
    ROUNDS,
    STEPS,
    STOPPED_AT,
    RayRuns,
    generation,
    make_ray_runs,
    output_of_workers,
    training,
    with_answers_that_differ,
)
from end_to_end.test_tour_samples import held_by_trackers
from end_to_end.trainer import GENERATION_CONFIG, HAS_ENGINES, HAS_RAY, Assets, Run, shown_lines
from same_training import assert_checkpoints_differ, assert_same_training
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from verl_valgen.prompts.tokens import Decoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(not (HAS_RAY and HAS_ENGINES), reason="this verl has no verl.trainer.sft_trainer_ray"),
]

LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "bias": "none", "task_type": "CAUSAL_LM"}
BATCH_SIZE = 8
"""Rows of a batch of the driver, which has all of them."""


@pytest.fixture(scope="module")
def assets(tmp_path_factory, assets) -> Assets:
    return with_answers_that_differ(assets, tmp_path_factory.mktemp("varied") / "assets")


@pytest.fixture(scope="module")
def runs(ray_server, tmp_path_factory, assets) -> RayRuns:
    return make_ray_runs(ray_server, tmp_path_factory.mktemp("ray"), assets)


def greedy(run: Run, step: int) -> list[dict[str, Any]]:
    return [sample for sample in run.samples(step) if sample["strategy"] in ("greedy", "default")]


def on_disk(assets: Assets) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32).eval()


def test_nothing_that_training_leaves_differs(runs):
    """Logs, parameters, optimizer and data loader; random states of the driver and of each worker."""
    assert_same_training(runs.on, runs.off, last_step=STEPS, num_steps=STEPS, num_validations=2, num_drivers=1)
    assert_checkpoints_differ(runs.off, STOPPED_AT, STEPS)
    for key in ("train/loss", "train/grad_norm"):
        assert runs.program.logged(key) == runs.off.logged(key)
        assert runs.resumed.logged(key) == runs.off.logged(key)[STOPPED_AT:]


def test_off_means_that_verls_own_class_trains_and_nothing_that_generates_is_loaded(runs):
    on, off = (json.loads((run.directory / "observed.json").read_text()) for run in (runs.on, runs.off))
    assert on["trainer"][:3] == ["SFTTrainer", "ValidationGenerationMixin", "SFTTrainer"]
    assert off["trainer"] == ["SFTTrainer", "object"]
    rooms = ("mixin", "prompts", "rounds", "weights", "backends", "scores", "trackers")
    assert not any(name.removeprefix("verl_valgen.").startswith(rooms) for name in off["loaded"])
    assert not runs.off.generations.exists()
    assert runs.off.warnings == []


def test_a_round_at_every_validation_has_the_first_rows_and_the_own_prompts(runs, assets):
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    rows = pd.read_parquet(assets.directory / "multiturn" / "val.parquet")["messages"]
    expected = [(row, list(rows[row])[:-1], rows[row][-1]["content"]) for row in range(NUM_ROWS)]
    for question, reference in (("Name the capital of France.", None), ("1+1?", "2")):
        expected.append((None, [{"role": "user", "content": question}], reference))
    assert sorted(path.name for path in runs.on.generations.glob("*.jsonl")) == [
        f"step_{step:08d}.jsonl" for step in ROUNDS
    ]
    for step in ROUNDS:
        samples = runs.on.samples(step)
        assert [(s["index"], s["strategy"], s["completion"]) for s in samples] == [
            (index, name, completion)
            for index in range(len(expected))
            for name, completion in (("greedy", 0), ("nucleus", 0), ("nucleus", 1))
        ]
        assert all(sample["verified"] is True and sample["step"] == step for sample in samples)
        assert [(s["row"], s["prompt"], s["reference"]) for s in greedy(runs.on, step)] == [
            (row, tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True), reference)
            for row, before, reference in expected
        ]
    count = 3 * len(expected)
    assert f"{count} samples ({len(expected)} prompts x 3 completions) at steps 0, 2 and 4, in" in runs.on.output


@pytest.mark.parametrize("step", ROUNDS)
def test_greedy_answers_are_those_of_a_plain_model(runs, assets, step):
    """Before training of the one on the disk, then of the checkpoint with the same weights."""
    model = plain_model(runs.on.checkpoints / f"global_step_{step}", assets.model) if step else on_disk(assets)
    samples = greedy(runs.on, step)
    assert len({sample["generation"] for sample in samples}) > 2, "others' answers would show nothing"
    assert_greedy_samples(samples, model, AutoTokenizer.from_pretrained(assets.model), MAX_NEW_TOKENS)


def test_adapters_are_in_the_answers_through_the_sharded_model_on_both_workers(runs, assets):
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    for step in (STOPPED_AT, STEPS):
        samples = runs.sharded.samples(step)
        assert [sample["row"] for sample in samples] == list(range(NUM_ROWS))
        assert all(sample["verified"] is True for sample in samples)
        model = plain_model(runs.sharded.checkpoints / f"global_step_{step}", assets.model, LORA)
        assert_nearly_greedy_samples(samples, model, tokenizer)
    assert [s["generation"] for s in runs.sharded.samples(STEPS)] != [s["generation"] for s in runs.sharded.samples(2)]
    assert runs.sharded.warnings_but_late == []


def test_the_driver_shows_and_says_everything(runs):
    for step in ROUNDS:
        samples = runs.on.samples(step)
        lines = [f"=== Validation Samples (Step {step}) ==="]
        for index in range(NUM_ROWS + 2):
            of_prompt = [sample for sample in samples if sample["index"] == index and sample["completion"] == 0]
            lines += shown_lines(of_prompt, has_strategies=True)
        assert "\n".join(lines) + "\n" in runs.on.stdout
    assert runs.on.warnings_but_late == []
    for run in (runs.on, runs.off, runs.resumed, runs.program, runs.sharded):
        assert "verl_valgen" not in "".join(line for line in output_of_workers(run).splitlines() if "WARNING" in line)
        assert "Validation Samples" not in output_of_workers(run)


def test_the_trackers_that_verl_opened_hold_the_rounds(runs):
    held = held_by_trackers(runs.on)
    assert sorted(held) == ["file", "tensorboard"]
    for history in held.values():
        for step in ROUNDS:
            lengths = [s["num_new_tokens"] for s in greedy(runs.on, step)]
            assert history[step]["val/gen/greedy/num_new_tokens"] == pytest.approx(sum(lengths) / len(lengths))
            assert {"val/gen/nucleus/shorter", "val/gen/greedy/exact_match", "val/gen/best"} <= history[step].keys()
    for sample in runs.on.samples(STEPS):
        assert sample["scores"]["shorter"] == float(sample["num_new_tokens"] < 9)


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_says_the_same_again(runs):
    assert " at steps 2 and 4, in checkpoints/generations" in runs.resumed.output
    names = [f"step_{step:08d}.jsonl" for step in ROUNDS]
    for name in names:
        assert (runs.resumed.generations / name).read_bytes() == (runs.on.generations / name).read_bytes()
    assert [path.name for path in (runs.resumed.generations / "old-1").glob("*.jsonl")] == names[-1:]
    best = [json.loads((run.generations / "best.json").read_text()) for run in (runs.on, runs.resumed)]
    assert best[0] == best[1]


def test_a_trainer_of_ones_own_answers_a_batch_in_the_driver(runs, assets):
    first, second = json.loads((runs.program.directory / "answers.json").read_text())
    assert first == second
    prompts, generations = first
    assert len(prompts) == BATCH_SIZE
    model, tokenizer = on_disk(assets), AutoTokenizer.from_pretrained(assets.model)
    for prompt, text in zip(prompts, generations, strict=True):
        output_ids = plain_greedy(model, tokenizer(prompt, add_special_tokens=False)["input_ids"], MAX_NEW_TOKENS)
        assert text == Decoder(tokenizer).answer(output_ids)


def test_training_goes_on_while_a_worker_answers(runs):
    """At every second validation; the answers are those of the step, and not of where training is by then."""
    assert (runs.program.directory / "answered_beside_training").exists()
    assert sorted(path.name for path in runs.program.generations.glob("*.jsonl")) == [
        f"step_{step:08d}.jsonl" for step in (STOPPED_AT, STEPS)
    ]
    for step in (STOPPED_AT, STEPS):
        samples = runs.program.samples(step)
        assert all(sample["verified"] is True and sample["step"] == step for sample in samples)
        assert [s["generation"] for s in samples] == [s["generation"] for s in greedy(runs.on, step)[:NUM_ROWS]]
    assert runs.program.warnings_but_late == []


def test_a_fault_on_either_worker_costs_one_warning_and_the_next_round_is_whole(runs, assets):
    run = runs.faulty
    assert len(run.logged("train/loss")) == len(run.logged("val/loss")) == 5
    assert run.output.count("planted in the answers of rank 0") == 1
    assert run.output.count("planted before the gather of rank 1") == 1
    assert not (run.generations / "step_00000003.jsonl").exists()
    for step in (1, 4, 5):
        assert [sample["row"] for sample in run.samples(step)] == list(range(NUM_ROWS))
    # What was made with a wrong copy at the last step is made again, without one.
    again = [warning for warning in run.warnings if "failed the check" in warning]
    assert len(again) == 1
    assert "the answers were made again" in again[0]
    assert len(run.warnings) == 3
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    model = plain_model(run.checkpoints / "global_step_5", assets.model)
    assert_nearly_greedy_samples(run.samples(5), model, tokenizer)
    assert all(sample["verified"] is True for sample in run.samples(5))


KILLED = """
import os, signal
from verl_valgen.rounds import proven

def plant():
    begin, rounds = proven.ProvenAnswerer.begin, []

    def die_in_the_second_round(self, *args, **kwargs):
        rounds.append(self)
        if len(rounds) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(self, *args, **kwargs)

    proven.ProvenAnswerer.begin = die_in_the_second_round

plant()
"""


def test_a_worker_that_dies_in_a_round_ends_the_run(ray_server, tmp_path, assets):
    """It cannot go on, and would wait for ever if it tried. `tests/reliability` has the same with Ray itself."""
    arguments = [*GENERATION_CONFIG, *training(assets, "fsdp2"), *generation("generation.do_sample=false")]
    result = ray_server.run(tmp_path, arguments, before=KILLED)
    assert result.returncode == 1
    assert "ActorDiedError" in result.stderr
    assert "training goes on" not in result.output
    assert len(result.samples(STOPPED_AT)) == NUM_ROWS
    assert [path.name for path in result.generations.glob("step_*.jsonl")] == [f"step_{STOPPED_AT:08d}.jsonl"]


def test_what_is_configured_wrongly_is_said_before_a_worker_is_there(ray_server, tmp_path, assets):
    result = ray_server.run(tmp_path, training(assets, "fsdp2"), environment={"VERL_GENERATION_TOP_P": "1.5"})
    assert result.returncode == 2, result.output[-3000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("verl-valgen: ")]
    assert lines == ["verl-valgen: VERL_GENERATION_TOP_P must be a number in (0, 1], got '1.5'"]
    assert "Traceback" not in result.output
    assert list(tmp_path.glob("worker_*.txt")) == []


def test_every_worker_took_part(runs):
    """Else the other assertions would be of one alone."""
    assert len(list((runs.on.checkpoints / f"global_step_{STEPS}").glob("model_*.pt"))) == NUM_WORKERS
    assert len(list(runs.on.directory.glob("worker_*.txt"))) == NUM_WORKERS
