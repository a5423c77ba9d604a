"""What the settings name is looked for before the model is loaded, and read once."""

from __future__ import annotations

import json

import pytest

from verl_valgen.backends import BACKENDS
from verl_valgen.rounds import preflight as preflight_module
from verl_valgen.rounds.preflight import Preflight, check_names, notes_on_ignored_settings, preflight
from verl_valgen.settings.checks import ConfigError, Mistakes
from verl_valgen.settings.load import GenerationSettings

WITH_STRATEGIES = {"strategies": {"hot": {"temperature": 2}, "cold": {"do_sample": False}}}


def checked(**block: object) -> Preflight:
    return preflight({"generation": block})


def message(**block: object) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(**block)
    return str(caught.value)


def test_what_is_there_is_accepted_and_the_file_is_read(tmp_path):
    (tmp_path / "own.txt").write_text("a\n\nb\n")
    result = checked(
        strategies={"hot": {"temperature": 2, "best_of": 3}, "plain": None},
        metrics="exact_match",
        best_metric="hot/exact_match_best",
        n=2,
        prompts=f"{tmp_path}/own.txt",
        backend=" HF ",
    )
    assert (result.settings.metrics, result.settings.backend) == (["exact_match"], "hf")
    assert [prompt.messages[0]["content"] for prompt in result.file_prompts] == ["a", "b"]


def test_the_parameters_of_rows_are_read_from_their_own_column(tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "a", "mine": {"top_k": 3}}))
    (prompt,) = checked(prompts=f"{tmp_path}/own.jsonl", params_key="mine").file_prompts
    assert prompt.data.params == {"top_k": 3}


@pytest.mark.parametrize("backend", ["auto", *(name for name in BACKENDS if name != "vllm")])
def test_every_backend_is_accepted(backend):
    """vLLM where it is installed: `test_without_vllm.py`."""
    assert checked(backend=backend).settings.backend == backend


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"backend": "sglang"}, "generation.backend must be one of auto, hf, fast, vllm, got 'sglang'"),
        ({"metrics": ["blue"]}, "generation.metrics must be names (exact_match, "),
        ({"prompts": "/nowhere.txt"}, "generation.prompts: /nowhere.txt: there is no such file"),
        ({"best_metric": "bleu"}, "generation.best_metric must be one of num_new_tokens, cut_off, empty, got 'bleu'"),
        ({"best_metric": "exact_match_bset", "metrics": ["exact_match"]}, "got 'exact_match_bset'"),
        (
            {"best_metric": "bleu", **WITH_STRATEGIES},
            "generation.best_metric must be one of num_new_tokens, cut_off, empty, as <strategy>/<number>, got 'bleu'",
        ),
        (
            {"best_metric": "exact_match_best", "metrics": ["exact_match"], **WITH_STRATEGIES},
            "generation.best_metric=exact_match_best: with generation.strategies it must name one of them: "
            "hot/exact_match_best, cold/exact_match_best",
        ),
        (
            {"best_metric": "empty", "strategies": {"only": {}}},
            "generation.best_metric=empty: with generation.strategies it must name one of them: only/empty",
        ),
        ({"strategies": {"best": {}}}, "generation.strategies: a round has a number called best already"),
        ({"strategies": {"bleu": {}}, "metrics": ["bleu"]}, "a round has a number called bleu already"),
        (
            {"best_metric": "greedy/empty"},
            "generation.best_metric: there is no strategy greedy (generation.strategies is not set), "
            "got 'greedy/empty'",
        ),
        (
            {"best_metric": "greedy/empty", **WITH_STRATEGIES},
            "generation.best_metric: there is no strategy greedy (generation.strategies has hot, cold), "
            "got 'greedy/empty'",
        ),
        ({"best_metric": "a/b/empty", **WITH_STRATEGIES}, "there is no strategy a/b ("),
    ],
)
def test_what_is_not_there_is_refused(block, expected):
    assert expected in message(**block)


@pytest.mark.parametrize("name", ["hot/mean_logprob", "hot/seq_rep_4", "cold/empty", "by_source/maths/empty"])
def test_a_best_value_of_any_number_that_a_round_has(name):
    assert checked(best_metric=name, **WITH_STRATEGIES).settings.best_metric == name
    whole = name.rpartition("/")[2]
    assert checked(best_metric=whole).settings.best_metric == whole


def test_all_mistakes_are_told_those_of_values_first():
    block = {"top_k": -1, "backend": "sglang", "metrics": ["blue"], "best_metric": "blue", "prompts": "/nowhere.txt"}
    lines = message(**block, strategies={"best": {}}).split("\n")
    keys = ["top_k", "backend", "metrics", "strategies:", "prompts:"]
    # The best metric may be right when the metrics are.
    assert [line.split()[0] for line in lines] == [f"generation.{key}" for key in keys]


def test_with_generation_off_neither_metrics_nor_files_are_looked_for():
    result = checked(enabled=False, metrics=["/nowhere.py:f"], prompts="/nowhere.txt", top_k=3)
    assert (result.settings.enabled, result.settings.top_k, result.file_prompts) == (False, 3, ())


def test_a_file_that_was_read_is_not_read_again(tmp_path, monkeypatch):
    (tmp_path / "own.txt").write_text("a\n")
    paths: list[str] = []
    read = preflight_module.read_own_prompts
    monkeypatch.setattr(preflight_module, "read_own_prompts", lambda path, key: paths.append(path) or read(path, key))
    settings = GenerationSettings(enabled=True, prompts=f"{tmp_path}/own.txt")
    assert len(check_names({}, settings, Mistakes()).file_prompts) == 1
    assert paths == [f"{tmp_path}/own.txt"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"n": 4, "best_of": 2}, []),
        ({"do_sample": False}, []),
        (
            {"do_sample": False, "n": 4},
            ["generation.n=4 has no effect with do_sample=false: one answer per prompt"],
        ),
        (
            {"n": 4, "best_of": 2, **WITH_STRATEGIES},
            [
                "generation.n=4 has no effect with strategies that do not sample (cold): one answer per prompt",
                "generation.best_of=2 has no effect with strategies that do not sample (cold): one answer per prompt",
            ],
        ),
        ({"do_sample": False, "n": 4, "strategies": {"hot": {"do_sample": True}}}, []),
        ({"reasoning_end": "</t>", "reasoning": "strip"}, []),
        ({"reasoning_end": "</t>"}, ["generation.reasoning_end has no effect with generation.reasoning=keep"]),
    ],
)
def test_settings_without_effect_are_told(values, expected):
    assert list(notes_on_ignored_settings(GenerationSettings(enabled=True, **values))) == expected
