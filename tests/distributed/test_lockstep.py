"""Ranks that go through the sharded model in step find out together which prompts may share a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from distributed.testing import run_distributed
from transformers import GenerationConfig, RwkvConfig, RwkvForCausalLM

from verl_valgen.backends.base import Limits
from verl_valgen.backends.hf import HFBackend
from verl_valgen.backends.lockstep import LockstepBackend
from verl_valgen.records import Request
from verl_valgen.weights.sharded import generating_through

LENGTHS = ((4, 11, 11, 7), (9,), ())
"""Of the prompts of each rank."""


def recurrent_model() -> Any:
    """A model whose answers depend on their neighbours as soon as there are any."""
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(vocab_size=60, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return model.eval()


@torch.no_grad()
def in_step_and_alone() -> tuple[Any, ...]:
    model, rank = recurrent_model(), dist.get_rank()
    params = {"do_sample": False, "max_new_tokens": 5}
    requests = [
        Request([3 + (7 * row + i * i) % 50 for i in range(length)], (row, 0), params)
        for row, length in enumerate(LENGTHS[rank])
    ]
    alone = HFBackend(model, None, 0, Limits(one_at_a_time=True)).generate(requests[:4])  # one rank has tried nothing
    with generating_through(model, model.generation_config, torch.device("cpu")) as through:
        backend = LockstepBackend(through, None, 0, Limits(), sequence_bytes=0, logprobs_bytes=0)
        counted: list[int] = []
        backend.on_answers = counted.append
        answers = backend.generate(requests)
        assert sum(counted) == len(requests)
        return answers, alone, through.num_passes


def test_padding_that_is_not_hidden_costs_all_ranks_the_same_passes(tmp_path):
    ranks = run_distributed(in_step_and_alone, len(LENGTHS), tmp_path)
    for answers, alone, _ in ranks:
        assert answers == alone
    assert len({num_passes for _, _, num_passes in ranks}) == 1
    assert len({token for answers, _, _ in ranks for one in answers for token in one.output_ids}) > 2
