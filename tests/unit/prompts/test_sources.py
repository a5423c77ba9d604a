"""Which prompts are asked, and what is said where there are none."""

from __future__ import annotations

import copy
import json
import logging

import pytest
from jinja2 import TemplateError
from omegaconf import OmegaConf
from unit.prompts.data import multi_turn, talk

from verl_valgen.hosts.sft import SFTHost
from verl_valgen.prompts.files import read_own_prompts
from verl_valgen.prompts.sources import read_prompts
from verl_valgen.settings.checks import ConfigError
from verl_valgen.settings.settings import GenerationSettings


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, {}),
        ({"apply_chat_template_kwargs": {"x": 1}}, {"x": 1}),
        (
            {"apply_chat_template_kwargs": {"x": 1}, "enable_thinking_default": False},
            {"x": 1, "enable_thinking": False},
        ),
        ({"enable_thinking_default": None}, {}),
    ],
)
def test_own_prompts_think_as_the_datas_do(data, expected):
    host = SFTHost.__new__(SFTHost)
    host.config = OmegaConf.create({"data": data})
    assert host.chat_template_kwargs == expected


@pytest.fixture
def file_prompts(tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "a", "mine": {"top_k": 3}}))
    return lambda params_key: read_own_prompts(str(tmp_path / "own.jsonl"), params_key)


@pytest.mark.parametrize(("params_key", "num_warnings"), [("generation_params", 0), ("mine", 0), ("nosuch", 1)])
def test_a_column_of_parameters_that_no_row_has_is_told(tokenizer, caplog, file_prompts, params_key, num_warnings):
    settings = GenerationSettings(enabled=True, prompts_mode="replace", params_key=params_key)
    with caplog.at_level(logging.WARNING, "verl_valgen"):
        assert len(read_prompts(None, [], tokenizer, settings, {}, file_prompts(params_key))) == 1
    assert [m for m in caplog.messages if "no row has anything in a column nosuch" in m] == caplog.messages
    assert len(caplog.messages) == num_warnings


@pytest.mark.parametrize(("mode", "expected"), [("replace", ["a"]), ("append", ["c?", "b?", "a"])])
def test_the_prompts_of_a_file_replace_the_datas_or_follow_them(tmp_path, tokenizer, file_prompts, mode, expected):
    dataset = multi_turn(tmp_path, tokenizer, [talk("b?", "B"), talk("c?", "C")])
    settings = GenerationSettings(enabled=True, prompts_mode=mode)
    prompts = read_prompts(dataset, [1, 0], tokenizer, settings, {}, file_prompts("generation_params"))
    assert [prompt.text for prompt in prompts] == expected


def test_rows_that_have_no_prompt_are_told(tmp_path, tokenizer, caplog):
    dataset = multi_turn(tmp_path, tokenizer, [talk("b?", "B"), talk("c?", "C")], max_length=3, truncation="right")
    with caplog.at_level(logging.WARNING, "verl_valgen"):
        assert read_prompts(dataset, [1, 0], tokenizer, GenerationSettings(enabled=True), {}, []) == []
    assert caplog.messages == [
        "rows [1, 0] of the validation data have no answer left within data.max_length: skipped",
        "no samples: none of the first 5 validation rows can be answered",
    ]


@pytest.fixture
def strict(tokenizer):
    """Refuses a message that says "no"."""
    tokenizer = copy.copy(tokenizer)
    refusing = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not so') }}{% endif %}{% endfor %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    return tokenizer


def test_a_row_that_the_template_refuses_is_left_out_and_named(tmp_path, strict, caplog):
    dataset = multi_turn(tmp_path, strict, [talk("a?", "A"), talk("no", "B"), talk("c?", "C")])
    with caplog.at_level(logging.WARNING, "verl_valgen"):
        prompts = read_prompts(dataset, [2, 1, 0], strict, GenerationSettings(enabled=True), {}, [])
    assert [(prompt.row, prompt.text) for prompt in prompts] == [(2, "c?"), (0, "a?")]
    assert caplog.messages == [
        "rows [1] of the validation data cannot be made a prompt (jinja2.exceptions.TemplateError: not so): skipped"
    ]


def test_where_no_row_can_be_made_a_prompt_own_prompts_still_are(tmp_path, strict, file_prompts):
    dataset = multi_turn(tmp_path, strict, [talk("no", "A"), talk("no", "B")])
    settings = GenerationSettings(enabled=True, prompts_mode="append")
    (prompt,) = read_prompts(dataset, [0, 1], strict, settings, {}, file_prompts("generation_params"))
    assert prompt.text == "a"
    with pytest.raises(TemplateError, match="not so"):
        read_prompts(dataset, [0, 1], strict, settings, {}, [])


def test_own_prompts_that_are_refused_are_an_error_that_names_the_first_ten(tmp_path, strict):
    (tmp_path / "own.txt").write_text("yes\n" + "no\n" * 13)
    settings = GenerationSettings(enabled=True)
    with pytest.raises(ConfigError) as caught:
        read_prompts(None, [], strict, settings, {}, read_own_prompts(str(tmp_path / "own.txt"), ""))
    *lines, last = str(caught.value).split("\n")
    assert [line.partition(", ")[2].partition(":")[0] for line in lines] == [f"line {i}" for i in range(2, 12)]
    assert last == "generation.prompts: 3 more prompts cannot be rendered"
