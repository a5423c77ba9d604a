"""Wrong configuration ends the run with one line and status 2, before the model is loaded.

The unit tests try every wrong value; these show what a run makes of them: the way in from Hydra within this process,
and one process as a user starts it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from end_to_end.trainer import HAS_ENGINES, MODEL_KEY, VERL_MODULE, run
from hydra import compose, initialize_config_dir

from verl_valgen import activation
from verl_valgen.hosts import load_host_class

CONFIG_NAME = f"sft_trainer{'_engine' if HAS_ENGINES else ''}_with_generation"


def composed(*overrides: str) -> Any:
    """The package's configuration for verl's trainer, as Hydra makes it."""
    with initialize_config_dir(str(activation.config_directory()), version_base=None):
        return compose(CONFIG_NAME, [*overrides, "hydra.searchpath=[pkg://verl.trainer.config]"])


class VerlStartsError(Exception):
    pass


def start(config: Any) -> None:
    """What verl's command does from its task function on, up to verl's own."""

    def run_verl(config: Any) -> None:
        raise VerlStartsError

    activation._run(config, load_host_class(VERL_MODULE), activation, run_verl, trainer_class=None)


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        ({"VERL_GENERATION_DO_SAMPLE": "maybe"}, [], "VERL_GENERATION_DO_SAMPLE must be a boolean"),
        ({"VERL_GENERATION_TEMPRATURE": "1.0"}, [], "did you mean VERL_GENERATION_TEMPERATURE?"),
        ({}, ["+generation.temprature=3"], "did you mean generation.temperature?"),
        (
            {},
            ["generation.prompts=/nowhere/own.jsonl"],
            "generation.prompts: /nowhere/own.jsonl: there is no such file",
        ),
        (
            {},
            ["generation.metrics=[/nowhere/own.py:f]"],
            "generation.metrics: /nowhere/own.py:f: there is no such file",
        ),
        (
            {},
            ["generation.strategies={x: {penalty_alpha: 0.6}}"],
            "generation.strategies.x.penalty_alpha is not supported",
        ),
        (
            {},
            ["generation.backend=vllm"],
            'generation.backend=vllm: vLLM is not installed (pip install "verl-valgen[vllm]")',
        ),
        ({}, ["generation.best_metric=exact"], "generation.best_metric must be one of num_new_tokens, "),
        (
            {},
            [
                "generation.strategies={greedy: {do_sample: false}, nucleus: {top_p: 0.95}}",
                *("generation.metrics=[exact_match]", "generation.best_metric=exact_match"),
            ],
            "generation.best_metric=exact_match: with generation.strategies it must name one of them: "
            "greedy/exact_match, nucleus/exact_match",
        ),
    ],
)
def test_it_is_one_line_and_status_2(monkeypatch, capsys, environment, overrides, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        start(composed(*overrides))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("verl-valgen: ")
    assert message in line


def test_with_generation_off_verl_starts_with_its_own_class(monkeypatch):
    """As on a machine with an accelerator, where nothing else is to be done for verl."""
    monkeypatch.setattr(load_host_class(VERL_MODULE), "has_accelerator", lambda module: True)
    with pytest.raises(VerlStartsError):
        start(composed("generation.enabled=false"))


def test_a_process_ends_with_one_line_before_the_model_is_loaded(tmp_path, assets):
    overrides = [*assets.overrides(), f"{MODEL_KEY}=/no/such/model"]
    result = run(tmp_path, overrides, environment={"VERL_GENERATION_TEMPRATURE": "1.0"})
    assert result.returncode == 2
    *_, line = result.stderr.strip().splitlines()  # what verl's imports warn of comes before
    assert line.startswith("verl-valgen: ")
    assert result.stderr.count("verl-valgen: ") == 1
    assert "did you mean VERL_GENERATION_TEMPERATURE?" in line
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_on_two_ranks_it_is_said_once(tmp_path, assets):
    environment = {"VERL_GENERATION_TOP_P": "1.5"}
    result = run(tmp_path, assets.overrides(), environment=environment, num_ranks=2)
    assert result.returncode != 0
    assert result.stderr.count("VERL_GENERATION_TOP_P must be a number in (0, 1], got '1.5'") == 1


@pytest.mark.slow
def test_a_prompt_that_the_template_refuses_ends_the_run_before_the_first_step(tmp_path, assets):
    call = {"role": "system", "content": None, "tool_calls": [{"name": "f"}]}  # the template adds a text to its content
    refused = {"messages": [call, {"role": "user", "content": "?"}], "tools": [{"name": "f"}]}
    (tmp_path / "own.jsonl").write_text(f'"What is 1 + 1?"\n{json.dumps(refused)}\n')
    result = run(tmp_path, [*assets.overrides(), f"+generation.prompts={tmp_path}/own.jsonl"])
    assert result.returncode == 2, result.output[-3000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("verl-valgen: ")]
    assert len(lines) == 1
    assert "own.jsonl, line 2: it cannot be rendered" in lines[0]
    assert result.logged("train/loss") == []
    assert not result.generations.exists()
