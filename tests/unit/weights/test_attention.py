"""The copy's attention computes what the trainer's does."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
)

from verl_valgen.weights.attention import with_torch_attention
from verl_valgen.weights.gather import gather

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.arange(3, 30)[None]
GEMMA = (Gemma2ForCausalLM, {"attn_logit_softcapping": 0.02, "query_pre_attn_scalar": 1})  # a cap that matters
PLAIN_GEMMA = (Gemma2ForCausalLM, {"attn_logit_softcapping": None})
LLAMA = (LlamaForCausalLM, {})
SINKS = (GptOssForCausalLM, {"num_local_experts": 4})
CONFIGS = {Gemma2ForCausalLM: Gemma2Config, LlamaForCausalLM: LlamaConfig, GptOssForCausalLM: GptOssConfig}


def build(model: tuple[Any, dict[str, Any]], attention: str) -> Any:
    cls, fields = model
    torch.manual_seed(0)
    return cls._from_config(CONFIGS[cls](**SHAPE, **fields), attn_implementation=attention).eval()


@pytest.mark.parametrize(
    ("model", "attention"), [(GEMMA, "eager"), (GEMMA, "sdpa"), (LLAMA, "eager"), (LLAMA, "sdpa"), (SINKS, "eager")]
)
def test_what_torch_serves_stays_as_the_trainer_has_it(model, attention):
    source = build(model, attention)
    plain = gather(source, dtype=torch.float32, device=CPU, keep=True)
    assert plain.config._attn_implementation == attention
    assert torch.equal(plain(IDS).logits, source(IDS).logits)


def test_a_soft_cap_makes_a_difference():
    assert not torch.allclose(build(GEMMA, "eager")(IDS).logits, build(GEMMA, "sdpa")(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("trainers", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn"])
@pytest.mark.parametrize(
    ("model", "expected"), [(GEMMA, "eager"), (PLAIN_GEMMA, "sdpa"), (LLAMA, "sdpa"), (SINKS, "eager")]
)
def test_attention_that_needs_more_than_torch_is_replaced_by_what_computes_the_same(model, trainers, expected, caplog):
    source = build(model, "eager")
    source.config._attn_implementation_internal = trainers  # cannot be had here
    with caplog.at_level(logging.DEBUG, logger="verl_valgen.weights.attention"):
        plain = gather(source, dtype=torch.float32, device=CPU, keep=True)
    assert plain.config._attn_implementation == expected
    assert f"in place of {trainers}" in caplog.text
    source.config._attn_implementation_internal = "eager"
    torch.testing.assert_close(plain(IDS).logits, source(IDS).logits, atol=1e-5, rtol=1e-4)
    assert source.config._attn_implementation == "eager"


def test_parts_of_a_model_are_judged_one_by_one():
    config = LlavaConfig(text_config=Gemma2Config(**SHAPE, **GEMMA[1]))
    config._attn_implementation = {"": "sdpa", "text_config": "flash_attention_2", "vision_config": "flash_attention_2"}
    before = copy.deepcopy(config)
    chosen = with_torch_attention(config)
    assert chosen._attn_implementation == "sdpa"
    assert chosen.text_config._attn_implementation == "eager"
    assert chosen.vision_config._attn_implementation is None
    assert config.text_config._attn_implementation == before.text_config._attn_implementation


def test_an_engine_with_attention_of_its_own_leaves_nothing_out():
    config = Gemma2Config(**SHAPE, **GEMMA[1])
    for named in ("sdpa", "flash_attention_2", None):
        config._attn_implementation = named
        assert with_torch_attention(config, is_trained_with=False)._attn_implementation == "eager"
    config.attn_logit_softcapping = None
    assert with_torch_attention(config, is_trained_with=False)._attn_implementation is None
