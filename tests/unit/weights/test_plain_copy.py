"""A plain copy stores a tied parameter once, leaves its source as it is, and is complete or names what is missing."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from verl_valgen.weights.empty import empty_from_config, empty_like
from verl_valgen.weights.plain_copy import PlainCopy

CPU = torch.device("cpu")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def build(**other: bool) -> LlamaForCausalLM:
    shape = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, **other))


@pytest.mark.parametrize("names", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)], ids=["embedding", "head", "both"])
def test_a_tied_parameter_is_stored_once_under_whichever_name_it_comes(names):
    source = build(tie_word_embeddings=True)
    copy = PlainCopy(empty_like(source, torch.bfloat16), CPU, source=source)
    for name, parameter in source.named_parameters():
        if name != EMBEDDING:
            copy.receive(name, parameter)
    for name in names:
        copy.receive(name, source.lm_head.weight)
    model = copy.finish()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, source.lm_head.weight.bfloat16())
    assert copy.num_bytes == 2 * source.num_parameters()


@pytest.mark.parametrize("names", [(EMBEDDING, HEAD), (HEAD, EMBEDDING)], ids=["embedding-first", "head-first"])
def test_a_stream_with_two_values_for_a_tied_parameter_unties_it(names):
    """As `from_pretrained` does where the checkpoint has two, whatever its configuration says."""
    source = build(tie_word_embeddings=True)
    two = {EMBEDDING: source.lm_head.weight, HEAD: torch.randn(37, 16)}
    copy = PlainCopy(empty_from_config(AutoModelForCausalLM, source.config, torch.bfloat16), CPU)
    for name, parameter in source.named_parameters():
        if name != EMBEDDING:
            copy.receive(name, parameter)
    for name in names:
        copy.receive(name, two[name])
    model = copy.finish()
    assert {name: torch.equal(model.get_parameter(name), two[name].bfloat16()) for name in two} == dict.fromkeys(
        two, True
    )
    assert not model.config.tie_word_embeddings
    assert source.config.tie_word_embeddings


def test_buffers_of_a_state_dict_are_received_too():
    model = empty_like(build(), torch.bfloat16)
    model.register_buffer("num_steps", torch.zeros((), dtype=torch.int64, device="meta"))
    PlainCopy(model, CPU).receive("num_steps", torch.tensor(9))
    assert (model.num_steps.item(), model.num_steps.dtype) == (9, torch.int64)


def test_the_copy_is_in_eval_mode_and_asks_for_no_gradient():
    source = build().train()
    copy = PlainCopy(empty_like(source, torch.float32), CPU, source=source)
    for name, parameter in source.named_parameters():
        copy.receive(name, parameter)
    model = copy.finish()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert source.training
    assert all(parameter.requires_grad for parameter in source.parameters())


def test_an_empty_model_uses_no_memory_and_no_random_numbers():
    source = build()
    before = torch.get_rng_state()
    model = empty_like(source, torch.float32)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(before, torch.get_rng_state())


def test_a_copy_that_is_not_complete_names_what_is_missing():
    source = build()
    copy = PlainCopy(empty_like(source, torch.float32), CPU, source=source)
    for name, parameter in source.named_parameters():
        if name != HEAD:
            copy.receive(name, parameter)
    with pytest.raises(RuntimeError, match=r"1 parameters were not gathered, lm_head\.weight first"):
        copy.finish()
