"""Our own decoding loop, without CUDA, gives Hugging Face's answers on the architectures that verl trains."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, GenerationConfig

from verl_valgen.backends.base import Limits
from verl_valgen.backends.fast import backend as fast_backend
from verl_valgen.backends.fast import loop
from verl_valgen.backends.fast.backend import FastBackend, why_unsuitable
from verl_valgen.backends.fast.fused import fuse
from verl_valgen.backends.fast.step import Decoder
from verl_valgen.backends.hf import HFBackend
from verl_valgen.records import Request

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LLAMA_LIKE = {"FusedAttention", "FusedMLP", "FusedNorm"}
# Configuration class and fields; the modules that are fused; why Hugging Face's loop runs, None where ours does.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], set[str], str | None]] = {
    "llama": ("LlamaConfig", {}, LLAMA_LIKE, None),
    "qwen2": ("Qwen2Config", {}, LLAMA_LIKE, None),
    "qwen3": ("Qwen3Config", {"head_dim": 16}, LLAMA_LIKE, None),
    "mistral": ("MistralConfig", {"sliding_window": 128}, LLAMA_LIKE, None),
    "short-window": ("MistralConfig", {"sliding_window": 20}, LLAMA_LIKE, "the sliding_attention reaches back 20 tok"),
    "gemma": ("GemmaConfig", {"head_dim": 16}, {"FusedAttention", "FusedMLP"}, None),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 128}, {"FusedAttention", "FusedMLP"}, None),
    "phi3": ("Phi3Config", {}, {"FusedNorm"}, None),
    "olmo2": ("Olmo2Config", {}, {"FusedNorm", "FusedMLP"}, None),
    "gpt2": ("GPT2Config", {}, set(), None),
    "neox": ("GPTNeoXConfig", {}, set(), None),
}
GREEDY = {"do_sample": False, "max_new_tokens": 24}
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.9, "max_new_tokens": 24}
REQUESTS = [Request(list(range(5, 8 + 3 * row)), (row, 0), {}) for row in range(5)]


def build(name: str) -> Any:
    config_name, extra, *_ = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(getattr(transformers, config_name)(**(SMALL | extra)))
        for parameter in model.parameters():  # norms and biases are ones and zeros else
            parameter.data += torch.randn_like(parameter) * 0.1
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def answer(cls: type, model: Any, params: Any, requests: Any = REQUESTS, **limits: Any) -> Any:
    backend = cls(model, None, 0, Limits(**({"batch_size": 3} | limits)))
    return backend.generate([replace(request, params=params) for request in requests])


# One architecture for each set of replaced modules, and one that Hugging Face's loop answers; the rest is slow.
REPRESENTATIVES = ("llama", "short-window", "gemma3", "phi3", "olmo2", "gpt2")
QUICK = [("llama", GREEDY), *((name, SAMPLING) for name in REPRESENTATIVES)]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        pytest.param(name, params, id=f"{name}-{kind}", marks=[] if (name, params) in QUICK else pytest.mark.slow)
        for name in ARCHITECTURES
        for kind, params in (("greedy", GREEDY), ("sampling", SAMPLING))
    ],
)
def test_it_says_what_hugging_face_says_with_fewer_kernels_too(name, params):
    model, (_, _, replaced, reason) = build(name), ARCHITECTURES[name]
    expected = answer(HFBackend, model, params)
    assert answer(FastBackend, model, params) == expected
    assert str(why_unsuitable(model, params, 64)).startswith(str(reason))
    fuse(model)
    kinds = {type(module).__name__ for module in model.modules()}
    assert kinds & LLAMA_LIKE == replaced
    assert answer(FastBackend, model, params) == expected
    assert answer(HFBackend, model, params) == expected


def doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


def swapped(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def clamped(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Like the usual one for all that a proof may see."""
    return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(max=1e4))


@pytest.mark.parametrize("forward", [doubled, swapped, clamped])
def test_what_gives_other_results_is_left_alone(forward):
    """A class that looks like the usual MLP and computes something else is kept, in the layer that has it."""
    model = build("llama")
    mlp = model.model.layers[1].mlp
    mlp.__class__ = type("OddMLP", (type(mlp),), {"forward": forward})
    expected = answer(HFBackend, model, GREEDY)
    fuse(model)
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["FusedMLP", "OddMLP"]
    assert {type(layer.self_attn).__name__ for layer in model.model.layers} == {"FusedAttention"}
    assert answer(FastBackend, model, GREEDY) == expected


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"num_beams": 2}, "beam_search does not go one token after the other"),
        ({"use_cache": False}, "generation.use_cache is set"),
        ({"cache_implementation": "offloaded"}, "generation.cache_implementation is set"),
        ({"guidance_scale": 1.5}, "generation.guidance_scale is set"),
    ],
)
def test_what_is_not_done_runs_in_hugging_faces_loop_and_says_so(params, reason, caplog):
    model = build("llama")
    assert why_unsuitable(model, GREEDY | params, 64) == reason
    if "cache_implementation" not in params:  # which wants an accelerator
        with caplog.at_level(logging.DEBUG, "verl_valgen"):
            assert answer(FastBackend, model, GREEDY | params) == answer(HFBackend, model, GREEDY | params)
        assert f"Hugging Face's loop: {reason}" in caplog.text


def test_a_model_without_steps_of_one_shape():
    model = build("llama")
    model._can_compile_fullgraph = False
    assert why_unsuitable(model, GREEDY, 64) == "LlamaForCausalLM has no steps of one shape"


def test_draws_among_candidates_follow_the_softmax_and_never_leave_the_top_k():
    """The same prompt two thousand times, in another row each."""
    model, num_draws, top_k = build("llama"), 2000, 5
    requests = [Request([7, 8, 9], (row, 0), {}) for row in range(num_draws)]
    params = SAMPLING | {"top_k": top_k, "top_p": 1.0, "max_new_tokens": 1}
    tokens = [completion.output_ids[0] for completion in answer(FastBackend, model, params, requests, batch_size=500)]
    best, ids = model(torch.tensor([[7, 8, 9]])).logits[0, -1].double().topk(top_k)
    counts = torch.tensor([tokens.count(int(token)) for token in ids], dtype=torch.float64)
    assert counts.sum() == num_draws
    expected = torch.softmax(best, -1) * num_draws
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 0.1 % of correct samplers exceed it, with 4 degrees of freedom


def test_too_many_ties_run_in_hugging_faces_loop(caplog):
    model = build("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight), requires_grad=False)
    params = SAMPLING | {"top_k": 20}
    expected = answer(HFBackend, model, params)
    assert len({token for completion in expected for token in completion.output_ids}) > 20
    with caplog.at_level(logging.DEBUG, "verl_valgen"):
        assert answer(FastBackend, model, params) == expected
    assert "Hugging Face's loop: too many tokens tie with the last of the top_k" in caplog.text


def test_a_deadline_ends_what_is_unfinished(monkeypatch):
    """A clock that moves one second at every look passes the deadline during the first batch."""
    now = [0.0]

    class Clock:
        @staticmethod
        def time() -> float:
            now[0] += 1.0
            return now[0]

        perf_counter = staticmethod(lambda: 0.0)

    from verl_valgen.backends import hf

    for module in (loop, hf, fast_backend):
        monkeypatch.setattr(module, "time", Clock)
    params = GREEDY | {"max_new_tokens": 100, "eos_token_id": 299}
    completions = answer(FastBackend, build("llama"), params, deadline=6.0)
    assert completions[0].finish_reason == completions[-1].finish_reason == "time"
    assert 1 < len(completions[0].output_ids) < 100
    assert completions[-1].output_ids == []
    whole = answer(FastBackend, build("llama"), params)
    assert completions[0].output_ids == whole[0].output_ids[: len(completions[0].output_ids)]


def test_out_of_memory_halves_the_batch_and_keeps_what_is_done(monkeypatch, caplog):
    """Memory ends in the middle of answers; those that have come to an end are not made again."""
    model, begun, most = build("llama"), [], 2
    begin, step = Decoder.begin, Decoder.step
    params = SAMPLING | {"eos_token_id": list(range(40))}  # so that they end at different times

    def noting(self: Decoder, rows: Any, states: Any, noise_keys: Any) -> None:
        begun.append(len(rows))
        begin(self, rows, states, noise_keys)

    def limited(self: Decoder, method: Any, num_rows: int, reach: int) -> Any:
        if num_rows > most and sum(begun) > 6:
            raise torch.OutOfMemoryError("planted")
        return step(self, method, num_rows, reach)

    asked = [Request([7, 8, row], (row, 0), {}) for row in range(9)]
    expected = answer(FastBackend, model, params, asked)
    monkeypatch.setattr(Decoder, "begin", noting)
    monkeypatch.setattr(Decoder, "step", limited)
    with caplog.at_level(logging.DEBUG, "verl_valgen"):
        assert answer(FastBackend, model, params, asked, batch_size=5) == expected
    assert begun[0] == 5
    assert 9 < sum(begun) < 2 * 9
    assert "out of memory with 5 prompts at once: going on with 3" in caplog.text
    assert "out of memory with 3 prompts at once: going on with 2" in caplog.text
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        answer(FastBackend, model, params, asked, batch_size=5)


def test_where_compiling_fails_it_goes_on_without_and_says_so_once(monkeypatch, caplog):
    def failing(function: Any, **kwargs: Any) -> Any:
        def compiled(*args: Any) -> Any:
            raise RuntimeError("no compiler")

        return compiled

    monkeypatch.setattr(fast_backend, "_compile_failures", [])
    monkeypatch.setattr(torch, "compile", failing)
    model = build("llama")
    expected = answer(FastBackend, model, GREEDY)
    for _ in range(2):
        assert answer(FastBackend, copy.deepcopy(model), GREEDY, compile=True) == expected
    assert caplog.text.count("going on without torch.compile, which failed: RuntimeError: no compiler") == 1


def test_an_old_transformers_lets_no_other_loop_in(monkeypatch):
    assert Version(transformers.__version__) >= Version("4.57")
    monkeypatch.setattr(transformers, "__version__", "4.51.3")
    assert why_unsuitable(build("llama"), GREEDY, 64) == "transformers 4.51.3 lets no other loop in"
