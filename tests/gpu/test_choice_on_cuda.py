"""The kernels that choose tokens on a GPU: the same cases as by Triton's interpreter, real sizes, and a CUDA graph."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from choice_cases import *  # noqa: F403 (collected here)
from choice_cases import PARAMETERS, by_transformers, chosen_by_kernels, of_all_kinds, processors_of, random_keys

from verl_valgen.backends.fast.choice import Choice
from verl_valgen.backends.fast.cuda_graph import CudaGraph

CUDA = torch.device("cuda", 0)
VOCAB_SIZE = 152_064


def real_logits(num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    spreads = torch.tensor([0.02, 1, 4, 8], device=CUDA).repeat(num_rows // 4)
    return (torch.randn(num_rows, VOCAB_SIZE).to(CUDA) * spreads[:, None]).to(dtype)


@of_all_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_of_a_real_vocabulary(params, dtype):
    """Up to one of 128 rows: float32 sums decide what lies on the edge of top-p."""
    logits = real_logits(128, dtype)
    keys = random_keys(128)
    chosen = chosen_by_kernels(logits, keys, params)
    assert (chosen.tokens != by_transformers(logits, keys, params)).sum() <= 1
    assert torch.equal(chosen_by_kernels(logits[5:8], keys[5:8], params).tokens, chosen.tokens[5:8])


def test_kernels_wait_for_nothing_and_a_graph_holds_them():
    for params in PARAMETERS:
        choice = Choice(processors_of(params, 8), VOCAB_SIZE)
        logits, keys = real_logits(8, torch.bfloat16), random_keys(8)

        def choose(choice=choice, logits=logits, keys=keys) -> torch.Tensor:
            return choice(logits, keys).tokens

        graph = CudaGraph(choose)
        graph()
        torch.cuda.set_sync_debug_mode("error")
        try:
            choose()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for _ in range(3):
            logits.copy_(real_logits(8, torch.bfloat16))
            keys.copy_(random_keys(8))
            assert torch.equal(graph(), choose())


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -3.0, 1.5]).to(CUDA)
    rows = logits.expand(40_000, -1).contiguous()
    tokens = chosen_by_kernels(rows, random_keys(40_000), {"temperature": 2.0}).tokens
    expected = torch.softmax(logits.double() / 2, -1) * 40_000
    assert (
        (torch.bincount(tokens, minlength=7) - expected) ** 2 / expected
    ).sum() < 22.5  # 0.1 %, 6 degrees of freedom
