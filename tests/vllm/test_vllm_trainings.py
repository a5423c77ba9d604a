"""`generation.backend=vllm` on verl's real trainer: what it answers, and that training does not notice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checkpoints import assert_greedy_samples, plain_model
from end_to_end.trainer import Run, run, strategy
from same_training import assert_checkpoints_differ, assert_same_training
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from vllm_runs import (
    CASES,
    ENGINE,
    GREEDY,
    LORA,
    MAX_NEW_TOKENS,
    NUM_ROWS,
    OWN_PROMPTS,
    ROUNDS,
    SAMPLED,
    STEPS,
    STOPPED_AT,
    STRATEGIES,
    VLLM,
    WITH_LORA,
    WITH_STRATEGIES,
    Pair,
    loaded,
    make_pair,
    remove,
)


@pytest.fixture(scope="module", params=CASES)
def pair(request, server, tmp_path_factory, assets) -> Iterator[Pair]:
    pair = make_pair(server, tmp_path_factory.mktemp("pair"), assets, request.param)
    yield pair
    remove(pair)


def model_at(pair: Pair, assets, step: int) -> PreTrainedModel:
    """Before training the one on the disk, then that of the checkpoint."""
    if step == 0:
        return AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32).eval()
    lora = LORA if pair.case.overrides == WITH_LORA else None
    return plain_model(pair.on.checkpoints / f"global_step_{step}", assets.model, lora)


def of(run: Run, step: int, strategy: str) -> list[dict[str, Any]]:
    return [sample for sample in run.samples(step) if sample["strategy"] == strategy]


def greedy(run: Run, step: int) -> list[dict[str, Any]]:
    return of(run, step, "greedy") or run.samples(step)


def test_greedy_answers_are_those_of_transformers_with_the_weights_of_each_round(pair, assets):
    """Token for token. Others' weights, those of an earlier round too, would say something else."""
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    assert pair.on.warnings_but_late == []
    for step in ROUNDS:
        samples = greedy(pair.on, step)
        assert len({sample["generation"] for sample in samples}) > 1
        assert all(sample["verified"] is True and sample["step"] == step for sample in pair.on.samples(step))
        assert_greedy_samples(samples, model_at(pair, assets, step), tokenizer, MAX_NEW_TOKENS)
    texts = [[sample["generation"] for sample in greedy(pair.on, step)] for step in ROUNDS]
    assert texts[0] != texts[1] != texts[2], "the weights of an earlier round would not be noticed"


def test_nothing_that_training_leaves_differs(pair):
    """Logs, parameters, optimizer, data loader, and random states at the end."""
    assert_same_training(pair.on, pair.off, last_step=STEPS, num_steps=STEPS, num_validations=2)
    assert_checkpoints_differ(pair.off, STOPPED_AT, STEPS)


def test_an_engine_is_loaded_on_every_rank_and_not_without(pair):
    num_ranks = pair.case.num_ranks or 1
    assert [ENGINE in names for names in loaded(pair.on)] == [True] * num_ranks
    assert [ENGINE in names for names in loaded(pair.off)] == [False] * num_ranks


def test_vllm_prints_nothing_of_its_own(pair):
    """But for what it says when verl imports it."""

    def lines(run: Run) -> set[str]:
        return set(re.findall(r"(?:INFO|WARNING|ERROR) \d\d-\d\d [\d:]+ (\[\w+\.py:\d+\] .*)", run.output))

    assert lines(pair.on) <= lines(pair.off)


with_strategies = pytest.mark.parametrize("pair", [WITH_STRATEGIES], indirect=True)


@with_strategies
def test_every_prompt_is_answered_under_each_strategy(pair):
    for step in ROUNDS:
        samples = pair.on.samples(step)
        assert [sample["prompt_text"] for sample in greedy(pair.on, step)][NUM_ROWS:] == list(OWN_PROMPTS)
        assert [(sample["index"], sample["strategy"], sample["completion"]) for sample in samples] == [
            (index, name, completion)
            for index in range(NUM_ROWS + len(OWN_PROMPTS))
            for name in STRATEGIES
            for completion in range(2 if name in SAMPLED else 1)
        ]


@with_strategies
@pytest.mark.parametrize("step", ROUNDS)
def test_parameters_do_what_they_do_in_transformers(pair, assets, step):
    model, tokenizer = model_at(pair, assets, step), AutoTokenizer.from_pretrained(assets.model)
    for name in ("stop", "penalty", "words"):
        parameters = {key: value for key, value in STRATEGIES[name].items() if key != "do_sample"}
        samples = of(pair.on, step, name)
        assert_greedy_samples(samples, model, tokenizer, MAX_NEW_TOKENS, **parameters)
        texts = [[sample["generation"] for sample in answers] for answers in (samples, greedy(pair.on, step))]
        assert texts[0] != texts[1], "without the parameter it would be the same"


@with_strategies
def test_sampled_answers_differ_and_are_scored_by_the_model(pair, assets):
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    for step in ROUNDS:
        sampled = of(pair.on, step, "nucleus")
        first, second = ([s["generation"] for s in sampled if s["completion"] == i] for i in range(2))
        assert all(one != other for one, other in zip(first, second, strict=True))
        model, num_scored = model_at(pair, assets, step), 0
        for sample in of(pair.on, step, "likeliest"):
            texts = sample["prompt"], sample["generation_raw"] or sample["generation"]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            if len(ids[1]) == sample["num_new_tokens"]:
                num_scored += 1
                assert sample["scores"]["mean_logprob"] == pytest.approx(mean_logprob(model, *ids), abs=1e-3)
        assert num_scored > NUM_ROWS


@torch.no_grad()
def mean_logprob(model: PreTrainedModel, prompt_ids: list[int], output_ids: list[int]) -> float:
    logits = model(torch.tensor([prompt_ids + output_ids])).logits[0, len(prompt_ids) - 1 : -1]  # (T, V)
    return logits.log_softmax(-1).gather(1, torch.tensor(output_ids)[:, None]).mean().item()


def test_verls_own_command_under_torchrun(tmp_path, assets):
    """Processes of their own from the start, as a user's are; verl's configuration, and a variable."""
    overrides = [
        *assets.overrides(), strategy("fsdp"), "trainer.save_freq=2", f"+{VLLM}", "+generation.tensor_parallel=2",
        f"+{GREEDY}", f"+generation.max_new_tokens={MAX_NEW_TOKENS}",
    ]  # fmt: skip
    result = run(tmp_path, overrides, environment={"VERL_MAX_VAL_SAMPLES": str(NUM_ROWS)}, num_ranks=2)
    assert result.returncode == 0, result.output[-5000:]
    assert result.warnings_but_late == []
    samples = result.samples(2)
    assert [sample["verified"] for sample in samples] == [True] * NUM_ROWS
    model = plain_model(result.checkpoints / "global_step_2", assets.model)
    assert_greedy_samples(samples, model, AutoTokenizer.from_pretrained(assets.model), MAX_NEW_TOKENS)
