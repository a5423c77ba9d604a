"""Texts that share a forward pass get the logits that they get alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from verl_valgen.weights.texts import last_logits

CPU = torch.device("cpu")
TEXTS = [list(range(5, 30)), [7, 9, 11, 13], [40, 41, 42, 43, 44, 45, 46, 47]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    shape = {"vocab_size": 90, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, initializer_range=0.3))
    return model.eval().requires_grad_(False)


def forward_that_keeps_all(input_ids: Any, attention_mask: Any, use_cache: bool) -> Any: ...


# Of the kept positions some are in the middle, all are at the end, and all are kept.
@pytest.mark.parametrize("nums_last", [(3, 4, 5), (23, 4, 8), (25, 4, 1)])
def test_logits_in_a_batch_are_those_without_one(model, nums_last):
    shapes = []
    model_shapes = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))
    alone = [last_logits(model, model.forward, [ids], [num], CPU)[0] for ids, num in zip(TEXTS, nums_last, strict=True)]
    assert shapes == [(1, num) for num in nums_last], "the head sees no other positions"
    together = last_logits(model, model.forward, TEXTS, nums_last, CPU, gives_positions=True)
    assert shapes[-1][0] == 3
    assert shapes[-1][1] <= min(25, sum(nums_last))
    model_shapes.remove()
    of_all = last_logits(model, forward_that_keeps_all, TEXTS, nums_last, CPU)
    assert [len(logits) for logits in together] == list(nums_last)
    for found in (together, of_all):
        for expected, actual in zip(alone, found, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_padding_brings_no_nan_of_a_token_that_no_text_has(model):
    spoilt = copy.deepcopy(model)
    spoilt.get_input_embeddings().weight[0] = torch.nan
    nums_last = (3, 4, 5)
    expected = last_logits(model, model.forward, TEXTS, nums_last, CPU)
    for found in last_logits(spoilt, model.forward, TEXTS, nums_last, CPU), expected:
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert all(logits.isfinite().all() for logits in expected)


def test_a_model_that_gives_all_positions_all_the_same_is_read_at_the_right_ones(model):
    def call(logits_to_keep: Any = 0, **inputs: Any) -> Any:
        return model(**inputs)

    expected = last_logits(model, model.forward, TEXTS, (3, 2, 5), CPU)
    for actual, logits in zip(last_logits(call, model.forward, TEXTS, (3, 2, 5), CPU), expected, strict=True):
        torch.testing.assert_close(actual, logits, rtol=1e-4, atol=1e-5)
