"""What the plan of a round is made of, by the way that it is answered."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig

from verl_valgen.backends import SHARDED, ways
from verl_valgen.records import Request
from verl_valgen.rounds.plan import BATCHES, ROWS
from verl_valgen.rounds.planning import Planner
from verl_valgen.settings.load import GenerationSettings

HOST: Any = SimpleNamespace(
    device=torch.device("cuda"),  # nothing is done there
    compute_dtype=torch.bfloat16,
    model_config=LlamaConfig(),
    num_parameters=1000,
    largest_unit_bytes=100,
    is_logging_rank=True,
    why_not_sharded=lambda: None,
    generation_config=GenerationConfig(),
    tokenizer=None,
)
WAYS = {way.name: way for way in (*ways("fast", "cuda"), SHARDED)}


@pytest.mark.parametrize(
    ("way", "params", "expected"),
    [
        ("fast", {}, ROWS),
        ("fast, unfused", {}, ROWS),
        ("fast", {"num_beams": 2}, BATCHES),
        ("fast", {"repetition_penalty": 1.3}, BATCHES),
        ("fast", {"do_sample": True, "top_k": 50, "top_p": 0.9}, ROWS),
        ("fast", {"do_sample": True, "eta_cutoff": 0.1}, ROWS),
        ("fast", {"do_sample": True, "top_k": -1}, BATCHES),
        ("hf", {}, BATCHES),
        (SHARDED.name, {}, BATCHES),
    ],
)
def test_many_requests_at_once_where_rows_are_refilled(way, params, expected):
    requests = [Request([1] * 10, (i, 0), {"max_new_tokens": 4, "do_sample": False}) for i in range(1000)]
    requests += [Request([1], (1000, 0), {"max_new_tokens": 4, "do_sample": False} | params)]
    planner = Planner(HOST, GenerationSettings(enabled=True))
    assert planner.plan(requests, math.inf, WAYS[way]).batch_size == expected.most
