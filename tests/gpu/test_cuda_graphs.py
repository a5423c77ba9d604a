"""Our decoding loop on CUDA: its answers, the memory that it leaves behind, and the cases that it cannot serve."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu.near_ties import MAX_ULP, ulp_below_the_best
from gpu.test_trainers import needs_compiler
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from verl_valgen.backends.base import Limits
from verl_valgen.backends.fast import cuda_graph, suitability
from verl_valgen.backends.fast.backend import FastBackend
from verl_valgen.backends.fast.suitability import try_model
from verl_valgen.backends.hf import HFBackend
from verl_valgen.records import Completion, Request
from verl_valgen.rounds.needs import rows_need
from verl_valgen.rounds.restore import preserved_blas_workspaces
from verl_valgen.settings.generation_config import special_tokens

GREEDY = {"do_sample": False, "max_new_tokens": 40}
SAMPLING = {"do_sample": True, "max_new_tokens": 40, "temperature": 1.0, "top_k": 50, "top_p": 0.7}
PARAMETERS = {
    "greedy": GREEDY,
    "sampling": SAMPLING,
    "nucleus": SAMPLING | {"top_k": 0, "top_p": 0.95},
    "min-p": SAMPLING | {"top_k": 0, "top_p": 1.0, "min_p": 0.05},
    "typical": SAMPLING | {"top_k": 0, "top_p": 1.0, "typical_p": 0.9},
    "penalised": SAMPLING | {"repetition_penalty": 1.3},
    "stop": SAMPLING | {"stop_strings": ["ab", "q"]},
    "beams": GREEDY | {"num_beams": 3},
}
CUDA = torch.device("cuda", 0)


def load(assets: Any, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(assets.model, dtype=dtype).to(CUDA).eval().requires_grad_(False)
    model.generation_config = special_tokens(model.generation_config, AutoTokenizer.from_pretrained(assets.model))
    return model


@pytest.fixture(scope="module")
def tokenizer(assets):
    return AutoTokenizer.from_pretrained(assets.model)


@pytest.fixture(scope="module")
def plain(assets) -> PreTrainedModel:
    return load(assets, torch.float32)


@pytest.fixture(scope="module")
def fused(assets) -> PreTrainedModel:
    model = load(assets, torch.float32)
    assert try_model(model, requests(9), may_fuse=True).unsuitable is None  # which captures a graph, too
    return model


@pytest.fixture
def in_bfloat16(assets) -> PreTrainedModel:
    return load(assets, torch.bfloat16)


@pytest.fixture
def captures(monkeypatch) -> list[Any]:
    """Grows with every graph that is captured."""
    captured: list[Any] = []
    capture = cuda_graph.CudaGraph._capture
    monkeypatch.setattr(cuda_graph.CudaGraph, "_capture", lambda self: (captured.append(1), capture(self))[1])
    return captured


def requests(*lengths: int) -> list[Request]:
    return [
        Request([5 + (row * 7 + i * i) % 80 for i in range(length)], (row, 0), {}) for row, length in enumerate(lengths)
    ]


MIXED = (3, 40, 1, 17, 90, 5, 60, 2, 33)


@torch.no_grad()
def answer(cls: type, model: Any, tokenizer: Any, params: Any, asked: Any, **limits: Any) -> list[Completion]:
    with preserved_blas_workspaces(CUDA):
        return cls(model, tokenizer, 0, Limits(**limits)).generate([replace(one, params=params) for one in asked])


def worst(reference: Any, completions: list[Completion]) -> float:
    """The largest distance of a token from the reference's own choice, in units of bfloat16's last place.

    Other kernels sum up in another order: of 144 tokens of an untrained model one was 4 away.

    Args:
        completions: The answers to `requests(*MIXED)`.
    """
    gaps = [
        max(ulp_below_the_best(reference, request.input_ids, completion.output_ids))
        for request, completion in zip(requests(*MIXED), completions, strict=True)
    ]
    print("worst near-ties, ulp:", sorted(gaps)[-3:])
    return max(gaps)


@pytest.mark.parametrize("params", PARAMETERS.values(), ids=PARAMETERS)
def test_it_says_what_hugging_face_says(plain, fused, tokenizer, params, captures):
    """In float32, where the kernels differ too little for near-ties."""
    expected = answer(HFBackend, plain, tokenizer, params, requests(*MIXED))
    assert answer(FastBackend, fused, tokenizer, params, requests(*MIXED)) == expected
    assert answer(FastBackend, fused, tokenizer, params, requests(*MIXED), batch_size=2) == expected
    assert len({tuple(completion.output_ids) for completion in expected}) > 1
    assert bool(captures) == (params.get("num_beams") is None)


def test_greedy_in_bfloat16_is_that_of_the_plain_model(in_bfloat16, assets, tokenizer):
    reference = load(assets, torch.bfloat16)
    assert worst(reference, answer(FastBackend, in_bfloat16, tokenizer, GREEDY, requests(*MIXED))) <= 2 * MAX_ULP


def test_one_capture_serves_all_batches(fused, tokenizer, captures):
    answer(FastBackend, fused, tokenizer, SAMPLING, requests(*MIXED), batch_size=2)
    assert len(captures) == 1


@torch.no_grad()
def test_requests_of_different_parameters_go_together(plain, fused, tokenizer, captures):
    kinds = [*PARAMETERS.values()]
    asked = [
        replace(one, params=kinds[i % len(kinds)], wants_logprob=i % 3 == 0)
        for i, one in enumerate(requests(*MIXED, *MIXED))
    ]
    with preserved_blas_workspaces(CUDA):
        expected = HFBackend(plain, tokenizer, 0, Limits(batch_size=1)).generate(asked)
        answers = FastBackend(fused, tokenizer, 0, Limits()).generate(asked)
    assert [one.output_ids for one in answers] == [one.output_ids for one in expected]
    for one, other in zip(answers, expected, strict=True):
        assert one.mean_logprob == (None if other.mean_logprob is None else pytest.approx(other.mean_logprob, abs=1e-4))
    # At most one for every kind but beams; what asks for log-probabilities is a kind of its own.
    kinds = {(str(one.params), one.wants_logprob) for one in asked if "num_beams" not in one.params}
    assert 1 < len(captures) <= len(kinds)


@pytest.mark.parametrize("name", ["greedy", "sampling", "nucleus", "penalised", "beams"])
def test_answers_that_met_nan_are_known(assets, tokenizer, name):
    """One batch after the other: what one has met is not taken for the next's, and does not come to it."""
    model, token = load(assets, torch.float32), 50
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)  # they may be tied
    model.get_input_embeddings().weight[token] = torch.nan
    first, *others = requests(*MIXED)
    asked = [replace(first, input_ids=[token, *first.input_ids]), *others]
    answers = answer(FastBackend, model, tokenizer, PARAMETERS[name], asked, batch_size=2)
    met = [token in one.input_ids + done.output_ids[:-1] for one, done in zip(asked, answers, strict=True)]
    assert [done.had_nan for done in answers] == met
    assert set(met) == {True, False}


def test_random_states_are_left_alone(fused, tokenizer):
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    answer(FastBackend, fused, tokenizer, SAMPLING, requests(*MIXED))
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], torch.cuda.get_rng_state())


@pytest.fixture
def without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def bytes_left(model: Any, tokenizer: Any, **limits: Any) -> int:
    torch.ones(8, 8, device=CUDA) @ torch.ones(8, 8, device=CUDA)  # as a trainer has done before
    before = torch.cuda.memory_allocated()
    answer(FastBackend, model, tokenizer, SAMPLING, requests(*MIXED), batch_size=4, **limits)
    return torch.cuda.memory_allocated() - before


def test_nothing_is_left_behind(fused, tokenizer, without_garbage_collection):
    answer(FastBackend, fused, tokenizer, SAMPLING, requests(*MIXED))  # its modules are fused
    assert bytes_left(fused, tokenizer) == 0


@needs_compiler
def test_compiled_it_says_the_same_and_compiles_once(in_bfloat16, assets, tokenizer, without_garbage_collection):
    reference = load(assets, torch.bfloat16)
    asked = requests(*MIXED)
    assert worst(reference, answer(FastBackend, in_bfloat16, tokenizer, GREEDY, asked, compile=True)) <= 2 * MAX_ULP
    answer(FastBackend, in_bfloat16, tokenizer, SAMPLING, asked, batch_size=4, compile=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert bytes_left(in_bfloat16, tokenizer, compile=True) == 0
    # As in the next round: another copy of the model.
    again = load(assets, torch.bfloat16)
    answer(FastBackend, again, tokenizer, SAMPLING, asked, batch_size=4, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_model_that_asks_the_host_gets_hugging_faces_loop(plain, assets, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(suitability, "_findings", {})
    asking = load(assets, torch.float32)
    asking.model.register_forward_pre_hook(lambda module, args: torch.ones(1, device=CUDA).item() and None)
    expected = answer(HFBackend, plain, tokenizer, SAMPLING, requests(*MIXED))
    with caplog.at_level(logging.DEBUG, "verl_valgen"):
        assert answer(FastBackend, asking, tokenizer, SAMPLING, requests(*MIXED)) == expected
    assert "Hugging Face's loop: a step cannot be captured" in caplog.text
    asking.model._forward_pre_hooks.clear()
    suitability._findings.clear()
    assert answer(FastBackend, asking, tokenizer, SAMPLING, requests(*MIXED)) == expected


def test_too_many_ties_get_hugging_faces_loop(assets, tokenizer, caplog):
    models = [load(assets, torch.float32) for _ in range(2)]
    for model in models:
        model.resize_token_embeddings(400, mean_resizing=False)
        model.get_output_embeddings().weight.data.zero_()
    params = SAMPLING | {"top_k": 20, "top_p": 1.0}
    expected = answer(HFBackend, models[0], tokenizer, params, requests(3, 4))
    with caplog.at_level(logging.DEBUG, "verl_valgen"):
        assert answer(FastBackend, models[1], tokenizer, params, requests(3, 4)) == expected
    assert "too many tokens tie" in caplog.text


def test_out_of_memory_halves_the_batch(fused, tokenizer, caplog, without_garbage_collection):
    params = GREEDY | {"max_new_tokens": 60}
    asked = [replace(one, params=params) for one in requests(*range(900, 932))]
    answer(FastBackend, fused, tokenizer, params, asked[:1])
    expected = answer(FastBackend, fused, tokenizer, params, asked, batch_size=4)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    row, prompts = rows_need(asked, fused.config, fused.dtype)
    enough = 16 * row + prompts
    assert enough < 32 * row
    try:
        for room, halves in ((enough, True), (2**24, False)):
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
            before = torch.cuda.memory_allocated()
            with caplog.at_level(logging.DEBUG, "verl_valgen"):
                if halves:
                    assert answer(FastBackend, fused, tokenizer, params, asked, batch_size=32) == expected
                    assert "out of memory with 32 prompts at once: going on with 16" in caplog.text
                else:
                    with pytest.raises(torch.OutOfMemoryError):
                        answer(FastBackend, fused, tokenizer, params, asked, batch_size=32)
            assert torch.cuda.memory_allocated() <= before
            torch.cuda.empty_cache()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
