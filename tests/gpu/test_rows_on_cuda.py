"""Rows that are refilled, on CUDA: what they say, what is captured for them, and the memory that they take."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu.test_cuda_graphs import (
    CUDA,
    GREEDY,
    PARAMETERS,
    SAMPLING,
    answer,
    captures,
    fused,
    in_bfloat16,
    plain,
    tokenizer,
    without_garbage_collection,
)

from verl_valgen.backends.base import Limits
from verl_valgen.backends.fast.attention import causal_attention
from verl_valgen.backends.fast.backend import FastBackend
from verl_valgen.backends.hf import HFBackend
from verl_valgen.records import Request
from verl_valgen.rounds.needs import rows_need
from verl_valgen.rounds.restore import preserved_blas_workspaces

__all__ = ["captures", "fused", "in_bfloat16", "plain", "tokenizer", "without_garbage_collection"]

UNEVEN = {"max_new_tokens": 120}
"""Of some hundred tokens one ends an answer: half of them end earlier."""


def many(number: int, longest: int = 100) -> list[Request]:
    """Prompts of uneven length, every third with a second completion."""
    rng = random.Random(0)
    asked = []
    for row in range(number):
        prompt = [rng.randrange(5, 85) for _ in range(rng.randint(1, longest))]
        asked += [Request(prompt, (row, completion), {}) for completion in range(1 + (row % 3 == 0))]
    return asked


@pytest.mark.parametrize("name", ["greedy", "sampling", "nucleus", "min-p", "typical", "stop"])
def test_they_say_what_hugging_face_says(plain, fused, tokenizer, name):
    """In float32, where the kernels differ too little for near-ties."""
    params, asked = PARAMETERS[name] | UNEVEN, many(40)
    expected = answer(HFBackend, plain, tokenizer, params, asked, batch_size=64)
    for rows in (7, 33):
        answers = answer(FastBackend, fused, tokenizer, params, asked, batch_size=rows)
        assert [one.output_ids for one in answers] == [one.output_ids for one in expected]
        assert [one.finish_reason for one in answers] == [one.finish_reason for one in expected]
    assert len({len(one.output_ids) for one in expected}) > 3 or name == "greedy"


def test_neither_order_nor_number_of_rows_matters(fused, tokenizer):
    params, asked = SAMPLING | UNEVEN, many(60)
    expected = answer(FastBackend, fused, tokenizer, params, asked, batch_size=16)
    order = random.Random(1).sample(range(len(asked)), len(asked))
    for rows in (5, 100):
        answers = answer(FastBackend, fused, tokenizer, params, [asked[i] for i in order], batch_size=rows)
        assert [one.output_ids for one in answers] == [expected[i].output_ids for i in order]


@torch.no_grad()
def test_what_was_made_ready_captures_nothing(fused, tokenizer, captures):
    kinds = [SAMPLING | UNEVEN, GREEDY]
    asked = [replace(one, params=kinds[i % 2]) for i, one in enumerate(many(30))]
    with preserved_blas_workspaces(CUDA):
        expected = FastBackend(fused, tokenizer, 0, Limits(9)).generate(asked)
        backend = FastBackend(fused, tokenizer, 0, Limits(9))
        backend.make_ready(asked)
        num_captures = len(captures)
        answers = backend.generate(asked)
    assert [one.output_ids for one in answers] == [one.output_ids for one in expected]
    assert len(captures) == num_captures > 0


def test_nothing_is_left_behind_when_rows_were_refilled_and_moved(fused, tokenizer, without_garbage_collection):
    params, asked = SAMPLING | UNEVEN, many(60)
    answer(FastBackend, fused, tokenizer, params, asked, batch_size=40)
    torch.ones(8, 8, device=CUDA) @ torch.ones(8, 8, device=CUDA)  # as a trainer has done before
    before = torch.cuda.memory_allocated()
    answer(FastBackend, fused, tokenizer, params, asked, batch_size=40)
    assert torch.cuda.memory_allocated() == before


def test_rows_take_no_more_than_the_plan_expects(in_bfloat16: Any, tokenizer):
    params, asked = SAMPLING | {"max_new_tokens": 60}, many(90, longest=1000)
    answer(FastBackend, in_bfloat16, tokenizer, params, asked[:9], batch_size=9)  # its modules are fused
    asked = [Request(one.input_ids, one.key, params) for one in asked]
    row, prompts = rows_need(asked, in_bfloat16.config, torch.bfloat16)
    for rows in (16, 100):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        answer(FastBackend, in_bfloat16, tokenizer, params, asked, batch_size=rows)
        took = torch.cuda.max_memory_allocated() - before
        print(f"{rows} rows: {took / 2**20:.0f} MiB of {(rows * row + prompts) / 2**20:.0f}")
        assert rows * row / 2 < took <= rows * row + prompts


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"), [(28, 128, torch.bfloat16), (4, 64, torch.float16), (8, 96, torch.float32)]
)
def test_prompts_attend_as_by_torch(heads, head_dim, dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, number, 77, head_dim, device=CUDA, dtype=dtype) for number in (heads, 4, 4))
    expected = F.scaled_dot_product_attention(
        query.double(), *(states.double().repeat_interleave(heads // 4, 1) for states in (key, value)), is_causal=True
    )
    module = torch.nn.Module()
    module.num_key_value_groups = heads // 4
    output, _ = causal_attention(module, query, key, value, None, scaling=head_dim**-0.5)
    assert output.shape == (3, 77, heads, head_dim)
    assert (output.transpose(1, 2) - expected).norm() <= 4e-3 * expected.norm()
