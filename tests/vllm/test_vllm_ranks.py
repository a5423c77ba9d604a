"""Engines on two ranks. One run of `vllm_ranks.py` serves all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_engines as engines
import vllm_ranks

MAX_RUN_S = 300


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(vllm_ranks.__file__).parent), *sys.path])
    run = subprocess.run(
        [*command, vllm_ranks.__file__, str(folder)],
        env=environment,
        timeout=MAX_RUN_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def expected():
    requests = engines.requests(engines.prompts(100))
    models = {seed: engines.model(vllm_ranks.CONFIG, seed) for seed in (1, 2)}
    return {
        str(seed): [completion.output_ids for completion in engines.expected(model, None, requests)]
        for seed, model in models.items()
    }


@pytest.mark.parametrize("name", vllm_ranks.SIZES)
def test_greedy_answers_are_those_of_the_weights_loaded_last(outcomes, expected, name):
    assert all(outcome[name]["greedy"] == expected for outcome in outcomes)


def test_sampled_answers_do_not_depend_on_who_holds_the_model(outcomes):
    first, *others = [outcome[name]["sampled"] for outcome in outcomes for name in vllm_ranks.SIZES]
    assert all(other == first for other in others)


def test_a_fault_on_one_rank_is_an_error_on_both(outcomes):
    for outcome in outcomes:
        assert "no room" in outcome["faults"]["failed"]
        assert "model.layers.0.self_attn.o_proj.weight differs" in outcome["faults"]["lost"]


def test_the_engine_serves_after_weights_that_did_arrive(outcomes, expected):
    assert all(outcome["after faults"] == expected["1"] for outcome in outcomes)


def test_ranks_stop_at_the_same_step(outcomes):
    assert outcomes[0]["stopped"] == outcomes[1]["stopped"]
    assert {reason for _, reason in outcomes[0]["stopped"]} == {"time"}


def test_ranks_have_the_same_cache_after_answers_that_stopped_together(outcomes):
    """Else one would find a prompt there that another has lost, and their steps would be of different sizes."""
    assert outcomes[0]["free blocks"] == outcomes[1]["free blocks"]
    assert sorted(outcomes[0]["free blocks"]) != outcomes[0]["free blocks"], "the order would say nothing"


def test_the_trainers_ranks_go_on(outcomes):
    for outcome in outcomes:
        assert [outcome[f"sum after {name}"] for name in vllm_ranks.SIZES] == [3, 3]
        assert outcome["environment is the same"]
