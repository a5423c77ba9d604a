"""What goes wrong with vLLM in a run of verl's trainer costs one warning; training goes on, and others answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from checkpoints import assert_greedy_samples, plain_model
from end_to_end.trainer import Assets, Run
from transformers import AutoTokenizer
from vllm_runs import ENGINE, GREEDY, MAX_NEW_TOKENS, NUM_ROWS, STEPS, STOPPED_AT, VLLM, Case, loaded, train

ONE_RANK = Case(None, "fsdp2", (), (VLLM, GREEDY))
TOGETHER = Case(2, "fsdp2", (), (VLLM, GREEDY, "generation.tensor_parallel=2"))
ROUNDS = (STOPPED_AT, STEPS)


def assert_answered_by_the_model(run: Run, assets: Assets) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    assert run.returncode == 0
    assert len(run.logged("train/loss")) == STEPS
    for step in ROUNDS:
        samples = run.samples(step)
        assert len(samples) == NUM_ROWS
        assert all(sample["verified"] is True for sample in samples)
        model = plain_model(run.checkpoints / f"global_step_{step}", assets.model)
        assert_greedy_samples(samples, model, tokenizer, MAX_NEW_TOKENS)


FAILED = """
import os
from verl_valgen.backends.vllm import making

def plant():
    make, failing = making.make, {ranks}

    def fail(*args, **kwargs):
        if len(failing) < int(os.environ.get("WORLD_SIZE", 1)):
            made = make(*args, **kwargs)  # all ranks take part: vLLM's own collectives would wait for this one
            if int(os.environ.get("RANK", 0)) not in failing:
                return made
        raise RuntimeError("planted: no engine")

    making.make = fail

plant()
"""


@pytest.mark.parametrize(("case", "ranks"), [(ONE_RANK, (0,)), (TOGETHER, (0, 1)), (TOGETHER, (0,)), (TOGETHER, (1,))])
def test_without_an_engine_others_answer_and_one_warning_says_so(server, tmp_path, assets, case, ranks):
    run = train(server, tmp_path / "run", assets, case, *case.generation, before=FAILED.format(ranks=ranks))
    assert_answered_by_the_model(run, assets)
    told = [warning for warning in run.warnings if "planted: no engine" in warning]
    assert len(told) == 1
    assert run.warnings_but_late == told
    assert "generation.backend=vllm" in told[0]


STALE = """
from verl_valgen.backends.vllm import engine

def plant():
    load, loaded = engine.Engine.load, []

    def load_once(self, *args, **kwargs):
        if not loaded:
            loaded.append(self)
            return load(self, *args, **kwargs)

    engine.Engine.load = load_once

plant()
"""


@pytest.mark.parametrize("case", [ONE_RANK, TOGETHER], ids=["one rank", "together"])
def test_answers_of_the_weights_of_an_earlier_round_are_not_shown(server, tmp_path, assets, case):
    case = replace(case, overrides=["optim.lr=4e-3"])  # with which two rounds' answers are far from each other's
    run = train(server, tmp_path / "run", assets, case, *case.generation, before=STALE)
    assert_answered_by_the_model(run, assets)
    assert len(run.warnings_but_late) == 1
    assert "vllm" in run.warnings_but_late[0]


def test_overlap_waits_for_vllm_and_one_line_says_so(server, tmp_path, assets):
    run = train(server, tmp_path / "run", assets, ONE_RANK, *ONE_RANK.generation, "generation.overlap=true")
    assert_answered_by_the_model(run, assets)
    assert run.warnings_but_late == []
    lines = [line for line in run.output.splitlines() if "generation.overlap" in line and "[INFO]" in line]
    assert len(lines) == 1
    assert "vllm" in lines[0]


def test_other_backends_load_no_more_of_vllm_than_verl_does(server, tmp_path, assets):
    on = train(server, tmp_path / "on", assets, ONE_RANK, GREEDY)
    off = train(server, tmp_path / "off", assets, ONE_RANK)
    assert_answered_by_the_model(on, assets)
    assert loaded(on) == loaded(off)
    assert ENGINE not in loaded(on)[0]
