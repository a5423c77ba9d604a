"""Layers without rotary positions are not fused: the fused attention rotates, and in bfloat16 the proof may miss it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import language, tiny_model
from verification import copy_of

from verl_valgen.backends.comparing import gaps
from verl_valgen.backends.fast.counterparts import maker
from verl_valgen.backends.fast.fused import fuse, is_fused


@pytest.mark.parametrize(
    ("name", "is_rotated"),
    [
        ("smollm3", [True, True, True, False]),  # by a flag of the layer
        ("cohere2", [True, True, True, False]),  # by whether it has a window
        ("exaone4", [True, True, True, False]),  # by a condition of two parts
        ("qwen3", [True] * 4),
    ],
)
def test_only_attention_that_is_known_to_rotate_has_a_counterpart(name, is_rotated):
    model, _ = tiny_model(name, "random")
    attentions = [layer.self_attn for layer in model.model.layers]
    assert [maker(attention) is not None for attention in attentions] == is_rotated


def test_a_model_with_such_layers_says_the_same_when_it_is_fused():
    model, _ = tiny_model("smollm3", "wide")
    plain = copy_of(model, torch.bfloat16)
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert is_fused(fused)
    ids = torch.tensor(language(2, 33, seed=77))
    with torch.no_grad():
        expected, actual = (one(input_ids=ids, use_cache=False).logits for one in (plain, fused))
    assert gaps(expected[0], actual[0]).median() < 0.01
