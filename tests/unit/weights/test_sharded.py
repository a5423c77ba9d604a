"""Generating through a wrapper gives the answers of the model itself and leaves the trainer's model as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from verl_valgen.backends.base import Limits
from verl_valgen.backends.hf import HFBackend
from verl_valgen.records import Request
from verl_valgen.weights.sharded import generating_through

CPU = torch.device("cpu")
OURS = GenerationConfig(eos_token_id=1, pad_token_id=0)
SAMPLING = {"do_sample": True, "max_new_tokens": 6, "temperature": 1.3, "top_k": 30}
REQUESTS = [
    *(Request(list(range(5, 8 + row)), (row, 0), SAMPLING, wants_logprob=row == 1) for row in range(3)),
    Request([5] * 64, (3, 0), SAMPLING),  # fills the context
]


@pytest.fixture
def model() -> LlamaForCausalLM:
    shape = {"vocab_size": 90, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(repetition_penalty=3.0)
    model.model.eval()  # a trainer may have frozen a part
    model.lm_head.train()
    return model


@torch.no_grad()
def test_answers_through_a_wrapper_are_those_of_the_model(model):
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(module))
    with generating_through(model, OURS, CPU) as through:
        completions = HFBackend(through, None, 0, Limits(batch_size=2)).generate(REQUESTS)
        assert through.num_passes == len(calls) > 0
    model.generation_config = OURS
    assert completions == HFBackend(model.eval(), None, 0, Limits(batch_size=2)).generate(REQUESTS)
    assert len({tuple(completion.output_ids) for completion in completions}) > 2


@pytest.mark.parametrize("fails", [False, True])
def test_the_trainers_model_is_left_as_it_was(model, fails):
    modes = {name: module.training for name, module in model.named_modules()}
    attributes, cls, config = dict(vars(model)), type(model), model.generation_config
    try:
        with generating_through(model, OURS, CPU) as through:
            assert not any(module.training for module in model.modules())
            assert through.generation_config is OURS
            if fails:
                raise MemoryError
    except MemoryError:
        pass
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2
    assert (type(model), model.generation_config) == (cls, config)
    assert vars(model).keys() == attributes.keys()
