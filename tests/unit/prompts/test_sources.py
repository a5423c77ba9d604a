"""What of the prompts the configuration decides."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from verl_valgen.hosts.sft import SFTHost
from verl_valgen.prompts.files import read_own_prompts
from verl_valgen.prompts.sources import read_prompts
from verl_valgen.settings.load import GenerationSettings


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


@pytest.mark.parametrize(("params_key", "num_warnings"), [("generation_params", 0), ("mine", 0), ("nosuch", 1)])
def test_a_column_of_parameters_that_no_row_has_is_told(tmp_path, tokenizer, caplog, params_key, num_warnings):
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "a", "mine": {"top_k": 3}}))
    host = SimpleNamespace(
        why_no_validation_batch=lambda: None,
        model_class=SimpleNamespace(generate=None, can_generate=lambda: True),
        tokenizer=tokenizer,
        chat_template_kwargs={},
    )
    settings = GenerationSettings(
        enabled=True, prompts=str(tmp_path / "own.jsonl"), prompts_mode="replace", params_key=params_key
    )
    with caplog.at_level(logging.WARNING, "verl_valgen"):
        assert len(read_prompts(host, settings, read_own_prompts(settings.prompts, params_key))) == 1
    assert [m for m in caplog.messages if "no row has anything in a column nosuch" in m] == caplog.messages
    assert len(caplog.messages) == num_warnings
