"""What the kernels that choose tokens must give: what transformers' processors do. For Triton's interpreter and a GPU.

`unit/backends/test_choice.py` runs these cases on CPU in a process of its own, as the interpreter must be chosen before
Triton is imported; `gpu/test_choice_on_cuda.py` runs them on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from verl_valgen.backends.fast.choice import Choice
from verl_valgen.backends.fast.kernels.sampling_noise import words_and_noise
from verl_valgen.backends.observers import NanObserver
from verl_valgen.backends.sampling import GumbelNoise, gumbel_noise, logits_warpers, perturbed, split_mix_64

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB_SIZE = 5_003
"""No multiple of any block, and larger than what a program reads."""
GREEDY: dict[str, Any] = {"do_sample": False}
PARAMETERS: tuple[dict[str, Any], ...] = (
    GREEDY,
    {},
    {"temperature": 0.7},
    {"top_k": 50, "top_p": 0.7},
    {"top_k": 20, "temperature": 1.3},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 0.9},
    {"top_k": 200, "top_p": 0.99},
    {"top_k": 600},
    {"top_p": 0.95},
    {"top_p": 0.3, "temperature": 0.6},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"top_p": 0.9, "min_p": 0.01, "temperature": 1.1},
)
of_all_kinds = pytest.mark.parametrize("params", PARAMETERS, ids=str)
by_each_way = pytest.mark.parametrize(
    "params", [GREEDY, {}, {"top_k": 50, "top_p": 0.7}, {"top_p": 0.95}, {"min_p": 0.05}], ids=str
)


@pytest.fixture(autouse=True)
def seeded_and_stable(monkeypatch):
    """On CPU, torch.sort puts equals in any order, and of them transformers keeps the last; on CUDA it is stable."""
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def processors_of(params: dict[str, Any], num_rows: int) -> LogitsProcessorList:
    """As `HFBackend` makes them."""
    processors = LogitsProcessorList()
    if params is not GREEDY:
        processors += logits_warpers(params, DEVICE)
        processors.append(GumbelNoise(0, [(row, 0) for row in range(num_rows)], 1, 1, DEVICE))
    processors.append(NanObserver(num_rows))
    return processors


def chosen_by_kernels(logits: Tensor, keys: Tensor, params: dict[str, Any]):
    choice = Choice(processors_of(params, len(logits)), logits.shape[1])
    assert choice.for_kernels is not None
    return choice(logits, keys)


def by_tensor_operations(logits: Tensor, keys: Tensor, params: dict[str, Any]):
    choice = Choice(processors_of(params, len(logits)), logits.shape[1])
    choice.for_kernels = None
    return choice(logits, keys)


def by_transformers(logits: Tensor, keys: Tensor, params: dict[str, Any]) -> Tensor:
    scores = logits.float()
    for processor in processors_of(params, len(logits)):
        if isinstance(processor, GumbelNoise):
            scores = perturbed(scores, keys)
        elif not isinstance(processor, NanObserver):
            scores = processor(None, scores)
    return scores.argmax(-1)


def random_keys(num_rows: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (num_rows,)).to(DEVICE)


def random_logits(dtype: torch.dtype = torch.float32) -> Tensor:
    """Of an untrained model, of one that has no idea, and of one that is sure; one row rises and one falls."""
    logits = torch.randn(5, VOCAB_SIZE) * torch.tensor([0.02, 1, 5, 3, 3])[:, None]
    logits[3:] = logits[3:].sort().values
    logits[4] = logits[4].flip(0)
    return logits.to(DEVICE, dtype)


# --- noise


def test_noise_is_that_of_the_tensor_operations():
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]).to(DEVICE)
    ids = torch.arange(3_001, device=DEVICE)
    words, noise = words_and_noise(keys, len(ids))
    assert torch.equal(words, split_mix_64(keys[:, None], ids))
    assert torch.equal(noise, gumbel_noise(keys[:, None], ids))


# --- tokens


@of_all_kinds
def test_tokens_are_those_of_transformers(params):
    logits = random_logits()
    keys = random_keys(len(logits))
    before = logits.clone()
    chosen = chosen_by_kernels(logits, keys, params)
    assert chosen.tokens.tolist() == by_transformers(logits, keys, params).tolist()
    assert not chosen.had_nan.any()
    assert not chosen.had_too_many_ties.any()
    assert torch.equal(logits, before)


@by_each_way
def test_logits_of_16_bits(params):
    for dtype in (torch.bfloat16, torch.float16):
        logits = random_logits(dtype)[1:4]
        keys = random_keys(3)
        assert torch.equal(chosen_by_kernels(logits, keys, params).tokens, by_transformers(logits, keys, params))


def test_logits_that_are_a_slice_of_others():
    wider = torch.randn(4, 2, 3_000).to(DEVICE)
    keys = random_keys(4)
    for logits in (wider[:, -1], wider[:, 0, ::2]):
        assert torch.equal(chosen_by_kernels(logits, keys, {}).tokens, by_transformers(logits, keys, {}))


@by_each_way
def test_a_row_depends_on_itself_alone(params):
    logits = random_logits()
    keys = random_keys(len(logits))
    together = chosen_by_kernels(logits, keys, params).tokens
    others = torch.full_like(logits, float("nan"))
    others[2] = logits[2]
    assert chosen_by_kernels(logits[2:3], keys[2:3], params).tokens.tolist() == [together[2]]
    assert chosen_by_kernels(others, keys, params).tokens[2] == together[2]


# --- ties


def test_the_first_of_equals_is_the_best():
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[1, [700, 4_500]] = logits[2, 5_002] = 1
    assert chosen_by_kernels(logits.to(DEVICE), random_keys(3), GREEDY).tokens.tolist() == [0, 700, 5_002]


@pytest.mark.parametrize("params", [{"top_p": 0.6}, {"top_p": 0.0}, {"min_p": 1.0}], ids=str)
def test_of_what_ties_at_the_edge_of_top_p_the_last_are_kept(params):
    logits = torch.zeros(9, VOCAB_SIZE)
    logits[2:4, ::7] = 2  # the edge lies among those of 0
    logits[4:8, 300::900] = 9  # and here among those of 9
    logits[8, 4_999] = 20
    keys, logits = random_keys(9), logits.to(DEVICE)
    assert torch.equal(chosen_by_kernels(logits, keys, params).tokens, by_transformers(logits, keys, params))


def test_what_ties_with_the_last_of_top_k_is_kept():
    logits = random_logits()
    logits[:, ::60] = 30  # 84 that tie
    keys = random_keys(len(logits))
    for params in ({"top_k": 5}, {"top_k": 60, "top_p": 0.4}):
        chosen = chosen_by_kernels(logits, keys, params)
        assert torch.equal(chosen.tokens, by_transformers(logits, keys, params))
        assert not chosen.had_too_many_ties.any()


@pytest.mark.parametrize("vocab_size", [1_000, VOCAB_SIZE])
def test_too_many_ties_are_told(vocab_size):
    logits = torch.randn(3, vocab_size)
    logits[0] = 0
    logits[1, :200] = 9
    for params in ({"top_k": 50}, {"top_k": 50, "top_p": 0.7}):
        chosen = chosen_by_kernels(logits.to(DEVICE), random_keys(3), params)
        assert chosen.had_too_many_ties.tolist() == [True, True, False]


# --- what is no number


@by_each_way
def test_nan_is_told(params):
    logits = random_logits()
    keys = random_keys(len(logits))
    right = chosen_by_kernels(logits, keys, params).tokens
    logits[0, -1] = logits[2, 7] = logits[2, 4_100] = float("nan")
    chosen = chosen_by_kernels(logits, keys, params)
    assert chosen.had_nan.tolist() == [True, False, True, False, False]
    assert chosen.tokens[chosen.had_nan].tolist() == [logits.shape[1] - 1, 7]
    assert torch.equal(chosen.tokens[~chosen.had_nan], right[~chosen.had_nan])


@by_each_way
def test_tokens_that_are_ruled_out(params):
    logits = random_logits()
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    allowed[0, 4_998] = allowed[1, 3:9] = allowed[2, ::40] = allowed[3, -200:] = allowed[4] = True
    logits = logits.masked_fill(~allowed, -torch.inf)
    keys = random_keys(len(logits))
    chosen = chosen_by_kernels(logits, keys, params)
    assert torch.equal(chosen.tokens, by_transformers(logits, keys, params))
    assert not chosen.had_nan.any()
    assert not chosen.had_too_many_ties.any()


@by_each_way
def test_infinite_logits(params):
    logits = random_logits()
    logits[0] = -torch.inf
    logits[1, 4_444] = torch.inf
    keys = random_keys(len(logits))
    chosen, expected = chosen_by_kernels(logits, keys, params), by_tensor_operations(logits, keys, params)
    assert torch.equal(chosen.had_nan, expected.had_nan)
    assert torch.equal(chosen.had_too_many_ties, expected.had_too_many_ties)
    assert 0 <= chosen.tokens[0] < logits.shape[1]
    assert torch.equal(chosen.tokens[1:], expected.tokens[1:])


# --- other processors


def test_in_another_order_tokens_are_still_those_of_transformers():
    logits = random_logits()
    keys = random_keys(len(logits))
    *warpers, noise, observer = processors_of({"temperature": 0.5, "top_p": 0.8, "min_p": 0.1}, len(logits))
    processors = LogitsProcessorList([*reversed(warpers), noise, observer])
    choice = Choice(processors, logits.shape[1])
    assert choice.for_kernels is None
    scores = logits
    for warper in reversed(warpers):
        scores = warper(None, scores)
    assert torch.equal(choice(logits, keys).tokens, perturbed(scores, keys).argmax(-1))
