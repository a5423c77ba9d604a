"""Triton's kernels on a GPU: the same cases as by its interpreter, in bfloat16 too, and random shapes."""

from __future__ import annotations

from random import Random

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from kernel_cases import *  # noqa: F403 (collected here)
from kernel_cases import attention_inputs, close, decode_attention, expected_attention

from verl_valgen.backends.fast.kernels import are_available


def test_kernels_are_available():
    assert are_available(torch.device("cuda"))


@pytest.mark.parametrize("seed", range(20))
def test_attention_of_random_shapes(seed):
    draw = Random(seed)
    dtype = draw.choice([torch.bfloat16, torch.float16])
    cache_length, num_kv_heads = draw.randint(1, 3000), draw.choice([1, 2, 4, 8])
    slots = [draw.randrange(cache_length) for _ in range(draw.choice([1, 3, 17, 64]))]
    head_dim = draw.choice([64, 80, 128])
    inputs = attention_inputs(
        dtype, slots, num_kv_heads * draw.choice([1, 4, 7]), num_kv_heads, head_dim, cache_length=cache_length
    )
    output = decode_attention(*inputs, head_dim**-0.5)
    assert close(output, expected_attention(*inputs, head_dim**-0.5), dtype)
