"""What vLLM cannot do is said before it is asked, and by names that people know."""

from __future__ import annotations

import subprocess
import sys

import pytest

from verl_valgen.backends.vllm.refusals import NEUTRAL, refusals

pytestmark = pytest.mark.any_verl

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.7, "max_new_tokens": 100}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"do_sample": False, "temperature": 0.001, "typical_p": 0.2},  # not read
        {"min_p": 0.1, "repetition_penalty": 1.2, "min_new_tokens": 3, "stop_strings": ["\n"]},
        {"bad_words_ids": [[1], [2, 3]], "eos_token_id": [4], "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0.01},
        {"temperature": 2.0},
        {"suppress_tokens": [], "sequence_bias": None},
        NEUTRAL,
    ],
)
def test_what_vllm_has_is_taken(params):
    assert refusals(SAMPLING | params) == []


@pytest.mark.parametrize(
    ("params", "line"),
    [
        ({"do_sample": False, "num_beams": 4}, "beams: generation.backend=vllm has none; use fast or hf"),
        ({"typical_p": 0.9}, "typical_p: generation.backend=vllm has no such parameter; use fast or hf"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size: generation.backend=vllm has no such parameter"),
        ({"suppress_tokens": [3]}, "suppress_tokens: generation.backend=vllm has no such parameter"),
        ({"use_cache": False}, "use_cache: generation.backend=vllm has no such parameter"),
        ({"a_later_one": 1}, "a_later_one: generation.backend=vllm has no such parameter"),
        ({"temperature": 0.005}, "temperature: generation.backend=vllm takes 0.01 to 2, got 0.005"),
        ({"temperature": 2.5}, "temperature: generation.backend=vllm takes 0.01 to 2, got 2.5"),
        ({"min_p": 1e-6}, "min_p: generation.backend=vllm takes 0 or at least 1e-05, got 1e-06"),
    ],
)
def test_the_rest_is_refused_by_name(params, line):
    (refusal,) = refusals(SAMPLING | params)
    assert refusal.startswith(line)


def test_several_are_all_named():
    lines = refusals(SAMPLING | {"typical_p": 0.9, "top_h": 0.5, "max_time": 3.0})
    assert [line.partition(":")[0] for line in lines] == ["typical_p", "top_h", "max_time"]


def test_asking_loads_nothing():
    program = (
        "import sys; from verl_valgen.backends.vllm.refusals import refusals; refusals({'num_beams': 2})\n"
        "assert not {'torch', 'transformers', 'vllm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
