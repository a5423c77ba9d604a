"""A copy computes what the PEFT model's own forward pass does, whatever its adapters are, or says why it cannot."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from verl_valgen.weights.gather import gather

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.arange(37)[None]


def tied() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))


def untied() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES))  # without biases


def experts() -> Any:
    return GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=4))


def gpt2() -> Any:
    fields = {"vocab_size": 37, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**fields))


def lora(**fields: Any) -> LoraConfig:
    defaults = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**(defaults | fields))


def add_second(model: Any, active: Any) -> None:
    model.add_adapter("second", lora(r=2, target_modules=["v_proj", "q_proj"]))
    model.base_model.set_adapter(active)


def scale(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 3.0)


def switch_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def merge_in_trainer(model: Any) -> None:
    model.merge_adapter()


Q_AND_V = {"target_modules": ["q_proj", "v_proj"]}
ON_PROMPTS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Name -> model, configuration of the adapter, what is done to the PEFT model, whether the copy is tied.
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[Any], None] | None, bool]] = {
    "head": (tied, lambda: lora(target_modules=["q_proj", "lm_head"]), None, False),
    "embedding": (tied, lambda: lora(target_modules=["q_proj", "embed_tokens"]), None, False),
    "head-and-embedding": (tied, lambda: lora(target_modules=["embed_tokens", "lm_head"]), None, False),
    "both-tied": (tied, lambda: lora(target_modules=["embed_tokens"], ensure_weight_tying=True), None, True),
    "head-dora": (tied, lambda: lora(target_modules=["lm_head"], use_dora=True), None, False),
    "head-ia3": (tied, lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), None, False),
    "gpt2-head": (gpt2, lambda: lora(target_modules=["lm_head", "c_attn"], fan_in_fan_out=True), None, False),
    "inner-layers": (tied, lora, None, True),
    "tokens": (tied, lambda: lora(trainable_token_indices=[1, 5, 9]), None, True),
    "tokens-of-the-head": (tied, lambda: lora(trainable_token_indices={"lm_head": [1, 5]}), None, False),
    "tokens-untied": (untied, lambda: lora(trainable_token_indices=[1, 5, 9]), None, False),
    "saved-head": (tied, lambda: lora(modules_to_save=["lm_head"]), None, False),
    "saved-embedding": (tied, lambda: lora(modules_to_save=["embed_tokens"]), None, False),
    "bias": (untied, lambda: lora(lora_bias=True, target_modules=["q_proj", "lm_head"]), None, False),
    "bias-beside-bias": (tied, lambda: lora(lora_bias=True, target_modules=["q_proj", "o_proj"]), None, True),
    "bias-all": (tied, lambda: lora(bias="all"), None, True),
    "experts": (experts, lambda: lora(target_parameters=FUSED, target_modules=["q_proj"]), None, False),
    "patterns": (untied, lambda: lora(rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 11}), None, False),
    "rslora": (untied, lambda: lora(use_rslora=True), None, False),
    "scaled": (untied, lora, scale, False),
    "two": (untied, lora, lambda model: add_second(model, ["default", "second"]), False),
    "second": (untied, lambda: lora(modules_to_save=["lm_head"]), lambda model: add_second(model, "second"), False),
    "off": (tied, lambda: lora(target_modules=["lm_head"]), switch_off, True),
    "off-saved-head": (tied, lambda: lora(modules_to_save=["lm_head"]), switch_off, True),
    "merged-in-trainer": (untied, lora, merge_in_trainer, False),
    "vera": (untied, lambda: peft.VeraConfig(r=4, **Q_AND_V), None, False),
    "oft": (untied, lambda: peft.OFTConfig(oft_block_size=4, r=0, **Q_AND_V), None, False),
    "boft": (untied, lambda: peft.BOFTConfig(boft_block_size=4, **Q_AND_V), None, False),  # not built on meta
    "loha": (untied, lambda: peft.LoHaConfig(r=3, alpha=5, **Q_AND_V), None, False),
    "fourierft": (untied, lambda: peft.FourierFTConfig(n_frequency=10, **Q_AND_V), None, False),
}


@torch.no_grad()
def peft_model(build: Callable[[], Any], config: Any, change: Callable[[Any], None] | None = None) -> Any:
    """A PEFT model whose adapters have random values, in eval mode."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied layers: the reason for these tests
        model = get_peft_model(build(), config)
    with_values = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if change is not None and change not in (switch_off, merge_in_trainer):
        change(model)
    for name, parameter in model.named_parameters():
        if id(parameter) in with_values or ".second" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if change in (switch_off, merge_in_trainer):
        change(model)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("name", CASES)
def test_a_copy_computes_what_the_peft_model_does(name):
    build, config, change, is_tied = CASES[name]
    source = peft_model(build, config(), change)
    expected, before = logits(source), copy.deepcopy(source.state_dict())
    if change is None:
        with source.disable_adapter():
            assert (logits(source) - expected).abs().max() > 1e-3
    plain = gather(source, dtype=torch.float32, device=CPU, keep=True)
    torch.testing.assert_close(logits(plain), expected, atol=3e-6, rtol=1e-5)
    plain.tie_weights()  # as a call of transformers' might
    torch.testing.assert_close(logits(plain), expected, atol=3e-6, rtol=1e-5)
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) is is_tied
    assert plain.config.tie_word_embeddings is is_tied
    # What was merged was rounded once, at the end.
    rounded = named(gather(source, dtype=torch.bfloat16, device=CPU, keep=True))
    assert all(torch.equal(rounded[key], tensor.bfloat16()) for key, tensor in named(plain).items())
    assert all(torch.equal(before[key], tensor) for key, tensor in source.state_dict().items())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            lambda: peft.PromptTuningConfig(**ON_PROMPTS),
            "PROMPT_TUNING adds to the prompt",
        ),
        (
            lambda: peft.PrefixTuningConfig(**ON_PROMPTS),
            "PREFIX_TUNING adds to the prompt",
        ),
        (lambda: peft.ShiraConfig(r=2, **Q_AND_V), "SHIRA cannot be rebuilt"),
    ],
)
def test_what_cannot_be_merged_is_named(config, reason):
    source = get_peft_model(untied(), config())
    with pytest.raises(NotImplementedError, match=reason):
        gather(source, dtype=torch.float32, device=CPU, keep=True)


def test_adapters_that_transformers_itself_put_into_the_model_are_named():
    source = untied()
    source.add_adapter(lora())
    with pytest.raises(NotImplementedError, match="adapters that are in the model without PEFT's model"):
        gather(source, dtype=torch.float32, device=CPU, keep=True)


def test_a_merge_that_gives_something_else_is_an_error(monkeypatch):
    source = peft_model(untied, lora())
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda self: self.merged_adapters.append("default"))
    with pytest.raises(NotImplementedError, match=r"lora\.layer\.Linear does not compute the same"):
        gather(source, dtype=torch.float32, device=CPU, keep=True)
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda self: None)
    with pytest.raises(NotImplementedError, match=r"lora\.layer\.Linear does not merge its adapters"):
        gather(source, dtype=torch.float32, device=CPU, keep=True)


def test_what_the_trainer_has_untied_is_untied():
    source = tied()
    source.lm_head.weight = nn.Parameter(torch.randn(37, 16))  # as transformers loads a checkpoint that has both
    plain = gather(source.eval(), dtype=torch.float32, device=CPU, keep=True)
    assert torch.equal(logits(plain), logits(source))
    assert plain.config.tie_word_embeddings is False


@pytest.mark.parametrize("name", ["head", "tokens", "saved-head"])
def test_a_copy_is_gone_without_a_garbage_collection(name):
    build, config, _, _ = CASES[name]
    source = peft_model(build, config())
    gc.collect()
    gc.disable()
    try:
        plain = gather(source, dtype=torch.float32, device=CPU, keep=True)
        parameters = [weakref.ref(parameter) for parameter in plain.parameters()]
        del plain
        assert [ref() for ref in parameters if ref() is not None] == []
    finally:
        gc.enable()
