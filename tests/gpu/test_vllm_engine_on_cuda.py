"""vLLM's engine by itself on one GPU, in bfloat16: a dense model, a mixture of experts, one engine after another."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from end_to_end.trainer import HAS_ENGINES
from process_state import assert_unchanged, observed
from transformers import PreTrainedModel

from verl_valgen.backends.judging import logprobs
from verl_valgen.records import Completion, Request
from verl_valgen.weights.checkpoint_stream import stream

pytestmark = [
    pytest.mark.skipif(not HAS_ENGINES, reason="vLLM does not run with this verl's transformers"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
if HAS_ENGINES:
    import vllm_engines as engines

    from verl_valgen.backends.vllm import allocator, process
    from verl_valgen.backends.vllm.backend import VLLMBackend
    from verl_valgen.backends.vllm.engine import Engine
    from verl_valgen.backends.vllm.making import EngineSize

VOCAB_SIZE = 1000
CACHE_BYTES = 2**28
SMALL_GAP, LARGE_GAP = 0.05, 1.0
"""Of greedy tokens' logits to the largest ones, in standard deviations of the logits: at most under the right weights,
at least under others. (Roundings choose other experts now and then: single gaps can be large.)"""


@cache
def model(kind: str, seed: int) -> PreTrainedModel:
    if kind == "mixture":
        made = engines.mixture(VOCAB_SIZE, seed)
    else:
        made = engines.model(engines.config(VOCAB_SIZE, hidden_size=256), seed)
    return made.to("cuda", torch.bfloat16)


def make(model: PreTrainedModel, *, max_num_seqs: int = 8, compile: bool = False) -> Engine:
    return engines.engine(
        model.config,
        EngineSize(1, 128, max_num_seqs, CACHE_BYTES),
        model_class=type(model),
        dtype=torch.bfloat16,
        device=torch.device("cuda", torch.cuda.current_device()),
        compile=compile,
    )


def load(engine: Engine, model: PreTrainedModel) -> None:
    stream(model, engine.load, dtype=torch.bfloat16, device=model.device, keep=True)


def requests(number: int = 8, **params: Any) -> list[Request]:
    return engines.requests(engines.prompts(VOCAB_SIZE, number), max_new_tokens=40, **params)


def answers(engine: Engine, requests: list[Request]) -> list[Completion]:
    return VLLMBackend(engine, None, 0).generate(requests)


@torch.no_grad()
def logits_of(model: PreTrainedModel, request: Request, completion: Completion) -> torch.Tensor:
    """(T, V) float32: what the model gives before each of the answer's tokens."""
    assert completion.output_ids
    ids = torch.tensor([request.input_ids + completion.output_ids], device="cuda")
    return model(ids).logits[0, len(request.input_ids) - 1 : -1].float()


def mean_gap(model: PreTrainedModel, requests: list[Request], completions: list[Completion]) -> float:
    gaps = []
    for request, completion in zip(requests, completions, strict=True):
        logits = logits_of(model, request, completion)
        chosen = logits[torch.arange(len(logits)), completion.output_ids]
        gaps.append((logits.max(-1).values - chosen) / logits.std(-1))
    return torch.cat(gaps).mean().item()


@pytest.fixture
def closing() -> Iterator[list[Engine]]:
    """Engines to be closed, whatever happens: there can be only one at a time."""
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_greedy_answers_are_those_of_the_weights_loaded_last(kind, closing):
    engine = make(model(kind, 1))
    closing.append(engine)
    found = []
    for seed in (1, 2, 1):
        load(engine, model(kind, seed))
        found.append(answers(engine, requests()))
        assert mean_gap(model(kind, seed), requests(), found[-1]) < SMALL_GAP
        assert mean_gap(model(kind, 3 - seed), requests(), found[-1]) > LARGE_GAP
        engine.sleep()
    assert [c.output_ids for c in found[2]] == [c.output_ids for c in found[0]]


def test_asleep_it_leaves_graphs_alone(closing):
    free_before = free_bytes()
    engine = make(model("dense", 1))
    closing.append(engine)
    for _ in range(2):
        load(engine, model("dense", 1))
        answers(engine, requests())
        free_awake = free_bytes()
        engine.sleep()
        assert free_bytes() - free_awake >= CACHE_BYTES
    print(f"{(free_before - free_bytes()) / 2**20:.0f} MiB more in use with the engine asleep than before")


def free_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_sampled_answers_come_with_the_models_log_probabilities(closing):
    engine, plain = make(model("dense", 1)), model("dense", 1)
    closing.append(engine)
    load(engine, plain)
    asked = requests(24, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)  # for 8 places
    found = answers(engine, asked)
    assert len({tuple(completion.output_ids) for completion in found}) == len(asked)
    assert [c.output_ids for c in answers(engine, asked)] == [c.output_ids for c in found]
    for request, completion in zip(asked, found, strict=True):
        expected = logprobs(logits_of(plain, request, completion), completion.output_ids).cpu()
        assert completion.logprobs is not None
        assert (torch.tensor(completion.logprobs) - expected).abs().mean() < 0.1


@pytest.mark.parametrize("compile", [(False, False), (False, True), (True, False)])
def test_another_engine_can_take_its_place(closing, compile):
    first = make(model("dense", 1), compile=compile[0])
    closing.append(first)
    load(first, model("dense", 1))
    assert mean_gap(model("dense", 1), requests(), answers(first, requests())) < SMALL_GAP
    first.sleep()
    first.close()
    second = make(model("dense", 2), max_num_seqs=16, compile=compile[1])
    closing.append(second)
    load(second, model("dense", 2))
    asked = requests(40)
    assert mean_gap(model("dense", 2), asked, answers(second, asked)) < SMALL_GAP


def test_what_was_launched_before_comes_first(monkeypatch):
    monkeypatch.setattr(process.Compartment, "_values", {})
    compartment = process.Compartment({}, torch.device("cuda", torch.cuda.current_device()), compile=False)
    with compartment.entered():
        torch.cuda.set_stream(torch.cuda.Stream())  # as vLLM may
    outer = torch.cuda.current_stream()
    numbers = torch.zeros(2**20, device="cuda")
    torch.cuda._sleep(10**8)  # some tens of milliseconds
    numbers.fill_(1)
    with compartment.entered():
        assert torch.cuda.current_stream() != outer
        inside = numbers.clone()
        torch.cuda._sleep(10**8)
        numbers.fill_(2)
    outside = numbers.clone()
    assert (inside == 1).all()
    assert (outside == 2).all()


def test_a_failed_one_leaves_room_for_another(closing):
    with pytest.raises(Exception, match=r"room for|KV cache|memory"):
        engines.engine(
            model("dense", 1).config, EngineSize(1, 512, 8, 2**14), dtype=torch.bfloat16, device=torch.device("cuda", 0)
        )
    engine = make(model("dense", 1))
    closing.append(engine)
    load(engine, model("dense", 1))
    assert mean_gap(model("dense", 1), requests(), answers(engine, requests())) < SMALL_GAP


@pytest.mark.parametrize("expandable", [False, True])
def test_nothing_of_the_process_is_changed(closing, expandable):
    model("dense", 1)
    was_expandable = bool(allocator.settings().get("expandable_segments"))
    torch.cuda.memory._set_allocator_settings(f"expandable_segments:{expandable}")  # as verl does
    try:
        torch.rand(1, device="cuda")
        before = observed()
        assert before["allocator"]["expandable_segments"] == expandable
        engine = make(model("dense", 1))
        closing.append(engine)
        assert_unchanged(before, "made")
        for _ in range(2):
            load(engine, model("dense", 1))
            assert_unchanged(before, "loaded")
            found = answers(engine, requests())
            assert_unchanged(before, "answered")
            engine.sleep()
            assert_unchanged(before, "asleep")
            assert mean_gap(model("dense", 1), requests(), found) < SMALL_GAP
        engine.close()
        assert_unchanged(before, "closed")
    finally:
        torch.cuda.memory._set_allocator_settings(f"expandable_segments:{was_expandable}")
