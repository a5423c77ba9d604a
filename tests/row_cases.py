"""A small model, prompts and parameters with which answers end at very different times, for tests of refilled rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import assets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config

from verl_valgen.backends.base import Limits
from verl_valgen.records import Completion, Request

EOS = tuple(range(40, 48))
"""Some tokens of ninety, so that answers end at very different times."""
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": list(EOS)}
SAMPLING = GREEDY | {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95}
PARAMETERS = {
    "greedy": GREEDY,
    "sampling": SAMPLING,
    "nucleus": SAMPLING | {"top_k": 0},
    "stop": SAMPLING | {"stop_strings": ["a", "q7", " t"]},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    assets.write_model(directory, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def model() -> Any:
    config = Qwen2Config(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return model.eval().requires_grad_(False)


def requests(*lengths: int, **params: Any) -> list[Request]:
    return [
        Request([3 + (row * 7 + i * i) % 37 for i in range(length)], (row, 0), params)
        for row, length in enumerate(lengths)
    ]


MIXED = (3, 40, 1, 17, 30, 5, 50, 2, 17, 1, 22, 9)


@torch.no_grad()
def answer(cls: type, model: Any, tokenizer: Any, asked: Any, params: Any = None, **limits: Any) -> list[Completion]:
    asked = [replace(one, params=params or one.params) for one in asked]
    return cls(model, tokenizer, 0, Limits(**({"batch_size": 3} | limits))).generate(asked)
