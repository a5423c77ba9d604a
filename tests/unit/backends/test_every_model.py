"""Models that the usual loop, the usual fusing or the usual padding would make say something else.

What is right is the model's own forward pass: over one sequence, without padding and without a cache.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from verl_valgen.backends import sharing
from verl_valgen.backends.base import Limits
from verl_valgen.backends.batching import group_requests, table_boundaries
from verl_valgen.backends.fast import backend as fast_backend
from verl_valgen.backends.fast import fused, suitability
from verl_valgen.backends.fast.backend import FastBackend
from verl_valgen.backends.fast.cache import RowCache
from verl_valgen.backends.fast.fused import fuse, is_fused, unfuse
from verl_valgen.backends.fast.fused_attention import FusedAttention
from verl_valgen.backends.fast.suitability import try_model
from verl_valgen.backends.hf import HFBackend
from verl_valgen.records import Request

IS_5 = int(transformers.__version__.partition(".")[0]) >= 5
EOS = 1
GREEDY = {"do_sample": False, "max_new_tokens": 6}
SMALL: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": EOS,
}  # fmt: skip
MIXED = (4, 11, 23, 11)


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(sharing, "_findings", {})
    monkeypatch.setattr(suitability, "_findings", {})
    monkeypatch.setattr(fast_backend, "_failures", {})


def build(config_name: str, **fields: Any) -> Any:
    """A model whose tokens depend on all that it does: of large random weights, its norms with signs."""
    if not hasattr(transformers, config_name):
        pytest.skip(f"transformers {transformers.__version__} has no {config_name}")
    config = getattr(transformers, config_name)(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).float()
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.data += torch.randn_like(parameter) * 0.3
                parameter.data[::2] *= -1  # else a token's best follower is itself where embeddings are tied
            else:
                parameter.data = torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0)
    return model.eval().requires_grad_(False)


def requests(*lengths: int, **params: Any) -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    return [
        Request(torch.randint(3, 88, (length,), generator=generator).tolist(), (row, 0), GREEDY | params)
        for row, length in enumerate(lengths)
    ]


@torch.no_grad()
def what_it_says(model: Any, request: Request) -> list[int]:
    """Greedy tokens, each from a forward pass of its own."""
    ids = list(request.input_ids)
    while len(ids) < len(request.input_ids) + request.params["max_new_tokens"] and ids[-1] != EOS:
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(request.input_ids) :]


@torch.no_grad()
def answer(cls: Any, model: Any, asked: list[Request]) -> list[list[int]]:
    return [one.output_ids for one in cls(model, None, 0, Limits()).generate(asked)]


def assert_right(model: Any, asked: list[Request]) -> None:
    """All ways answer as the model does."""
    expected = [what_it_says(model, one) for one in asked]
    assert len({token for tokens in expected for token in tokens}) > 2
    for cls in (HFBackend, FastBackend):
        assert answer(cls, copy.deepcopy(model), asked) == expected
    through_fused = copy.deepcopy(model)
    fuse(through_fused)
    assert answer(FastBackend, through_fused, asked) == expected
    assert answer(HFBackend, through_fused, asked) == expected


def slow_where(name: str, *slow: str) -> Any:
    return pytest.param(name, marks=[pytest.mark.slow] if name in slow else [])


def count(model: Any, name: str) -> int:
    return sum(type(module).__name__ == name for module in model.modules())


SLIDING = {"sliding_window": 64, "head_dim": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Configuration class, fields, and how many of the attentions may be fused.
ROTARY: dict[str, tuple[str, dict[str, Any], int]] = {
    "no rotation in one layer": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}, 2),
    "none where a layer sees all": (
        "Exaone4Config", SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, 2,
    ),
    "none where a layer sees all, interleaved": (
        "Cohere2Config", SLIDING | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, 0,
    ),
    "rotation of a part": (
        "Glm4MoeConfig",
        MOE | {"partial_rotary_factor": 0.5, "head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}, 3,
    ),
    "rotation of a part, other names": ("StableLmConfig", {"partial_rotary_factor": 0.25}, 0),
    "clipped": ("OlmoConfig", {"clip_qkv": 0.5}, 0),
    "own factors": ("GraniteConfig", {"attention_multiplier": 0.3, "residual_multiplier": 0.5}, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", [slow_where(name, "clipped", "own factors") for name in ROTARY])
def test_every_fused_layer_is_proven_and_can_be_taken_back(name):
    config_name, fields, num_fused = ROTARY[name]
    model = build(config_name, **(SMALL | fields))
    assert_right(model, requests(*MIXED))
    before = copy.deepcopy(model)
    fuse(model)
    assert count(model, "FusedAttention") == num_fused
    unfuse(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    assert list(model.state_dict()) == list(before.state_dict())
    for key, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    ids = torch.tensor([requests(20)[0].input_ids])
    assert torch.equal(model(input_ids=ids).logits, before(input_ids=ids).logits)


def test_a_scale_that_begins_beyond_what_a_proof_sees():
    """Queries grow with the position from the 32nd token on."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 3.0}
    rope["original_max_position_embeddings"] = 32
    model = build("Ministral3Config", **SMALL, head_dim=8, rope_parameters=rope)
    assert_right(model, requests(5, 40, 70))
    fuse(model)
    assert (count(model, "FusedAttention"), count(model, "FusedMLP")) == (0, 3)


def test_weights_are_in_memory_once():
    """The originals of what is fused have their weights within the joined ones; so the second time nothing moves."""
    model = build("LlamaConfig", **SMALL)
    original = model.model.layers[0].self_attn
    for _ in range(2):
        fuse(model)
        joined = model.model.layers[0].self_attn.qkv_proj.weight
        place = joined.untyped_storage().data_ptr()
        for linear in (original.q_proj, original.k_proj, original.v_proj):
            assert linear.weight.untyped_storage().data_ptr() == place
        unfuse(model)
        assert model.model.layers[0].self_attn is original
    fuse(model)
    assert model.model.layers[0].self_attn.qkv_proj.weight.untyped_storage().data_ptr() == place


def test_a_proof_serves_the_next_round(monkeypatch):
    model = build("LlamaConfig", **SMALL)
    again, other = copy.deepcopy(model), copy.deepcopy(model)
    mlp_class: Any = type(other.model.layers[1].mlp)
    other.model.layers[1].mlp.__class__ = type("OtherMLP", (mlp_class,), {})
    finding = try_model(model, requests(9), may_fuse=True)
    assert (finding.unsuitable, len(finding.proven)) == (None, 3 + 3 + 7)
    monkeypatch.setattr(suitability, "decoded_logits", None)
    monkeypatch.setattr(fused, "decoded_logits", None)
    assert try_model(again, requests(9), may_fuse=True) is finding
    assert (count(again, "FusedAttention"), count(again, "FusedMLP")) == (3, 3)
    try_model(other, requests(9), may_fuse=True)
    assert (count(other, "FusedAttention"), count(other, "FusedMLP")) == (3, 2)


def test_fused_modules_that_are_wrong_together_are_taken_back(monkeypatch, caplog):
    monkeypatch.setattr(fused, "_is_same", lambda expected, actual: torch.tensor(True))
    model = build("Cohere2Config", **(SMALL | ROTARY["none where a layer sees all, interleaved"][1]))
    with caplog.at_level(logging.DEBUG, "verl_valgen"):
        finding = try_model(model, requests(9), may_fuse=True)
    assert finding == (None, frozenset())
    assert not is_fused(model)
    assert "Cohere2ForCausalLM: nothing is fused: its logits differ by" in caplog.text


def test_hugging_faces_loop_gets_the_model_as_it_came(monkeypatch, caplog):
    model = build("LlamaConfig", **SMALL)
    asked = requests(*MIXED)
    expected = [what_it_says(model, one) for one in asked]
    fuse(model)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("tables of another width")

    monkeypatch.setattr(FusedAttention, "forward", broken)
    with caplog.at_level(logging.DEBUG, "verl_valgen"):
        assert answer(FastBackend, model, asked) == expected
    assert not is_fused(model)
    assert "Hugging Face's loop" in caplog.text
    assert "one prompt at a time" not in caplog.text


# Their classes do not know our masks or positions, each in its own way.
OTHER_LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {"vocab_size": 90, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bart": (
        "BartConfig",
        {"vocab_size": 90, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
         "max_position_embeddings": 128, "is_decoder": True, "is_encoder_decoder": False},
    ),
    "pegasus": (
        "PegasusConfig",
        {"vocab_size": 90, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
         "max_position_embeddings": 128, "is_decoder": True, "is_encoder_decoder": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_LOOPS)
def test_what_our_loop_cannot_serve_is_tried_once(name, monkeypatch, caplog):
    config_name, fields = OTHER_LOOPS[name]
    model = build(config_name, **fields)
    assert_right(model, requests(*MIXED))
    monkeypatch.setattr(suitability, "decoded_logits", None)  # not again: what is known holds for the next copy
    with caplog.at_level(logging.DEBUG, "verl_valgen"):
        answer(FastBackend, copy.deepcopy(model), requests(*MIXED))
    assert "Hugging Face's loop: " in caplog.text
    assert "NoneType" not in caplog.text


def test_what_fails_in_our_loop_alone_is_answered_and_remembered(caplog):
    """Beyond what a trial sees."""
    model, asked = build("LlamaConfig", **SMALL), requests(4, 40)
    expected = [what_it_says(model, one) for one in asked]
    attempts = []

    def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if input_ids.shape[1] > 30 and isinstance(kwargs["past_key_values"], RowCache):
            attempts.append(input_ids.shape)
            raise AttributeError("no such cache")
        return type(model).forward(self, input_ids=input_ids, **kwargs)

    picky = copy.deepcopy(model)
    picky.__class__ = type("PickyForCausalLM", (type(model),), {"forward": forward})
    with caplog.at_level(logging.DEBUG, "verl_valgen"):
        for _ in range(2):
            assert answer(FastBackend, picky, asked) == expected
    assert len(attempts) == 1
    assert caplog.text.count("Hugging Face's loop: AttributeError: no such cache") == 2


def test_what_fails_in_both_loops_is_the_fault_of_the_parameters():
    with torch.no_grad():
        asked = requests(4, 9, exponential_decay_length_penalty=[1])
        answers = FastBackend(build("LlamaConfig", **SMALL), None, 0).generate(asked)
    assert [one.finish_reason for one in answers] == ["error"] * 2
    assert fast_backend._failures == {}


TINY = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2}
CHUNKS = {
    "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "no_rope_layers": [1, 1, 0],
    "interleave_moe_layer_step": 1,
}  # fmt: skip
# Configuration class, fields, and the prompts' lengths.
NEIGHBOURS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "recurrent": ("RwkvConfig", TINY | {"attention_hidden_size": 32}, MIXED),
    "recurrent and attentive": (
        "RecurrentGemmaConfig", SMALL | {"attention_window_size": 64, "lru_width": 32, "head_dim": 8}, MIXED,
    ),
    "convolutional": ("Lfm2Config", SMALL | {"layer_types": ["conv", "full_attention", "conv"]}, MIXED),
    "chunks": ("Llama4TextConfig", SMALL | CHUNKS | {"attention_chunk_size": 8, "floor_scale": 4}, MIXED),
    "a scale that begins beyond what a trial sees": (
        "Llama4TextConfig",
        SMALL | CHUNKS | {"attention_chunk_size": 64, "floor_scale": 24, "attn_scale": 5.0},
        (4, 40, 20, 40),
    ),
    "sliding": ("MistralConfig", SMALL | {"sliding_window": 8}, MIXED),
    "learned positions": (
        "OPTConfig", TINY | {"num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}, MIXED,
    ),
    "its cache is wrong": (
        "MiniMaxConfig",
        SMALL | {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                 "block_size": 8},
        MIXED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [slow_where(name, "sliding", "learned positions") for name in NEIGHBOURS])
def test_an_answer_does_not_depend_on_its_neighbours(name):
    config_name, fields, lengths = NEIGHBOURS[name]
    assert_right(build(config_name, **fields), requests(*lengths))


def test_long_sequences_that_padding_would_move_are_together_with_those_of_their_length():
    fields = SMALL | CHUNKS | {"attention_chunk_size": 32, "floor_scale": 64}
    config = build("Llama4TextConfig", **fields).config
    groups = group_requests(requests(4, 40, 20, 40, 30), config)[0]
    assert [group.indices for group in groups] == [[0, 2], [4], [1, 3]]
    config.attn_temperature_tuning, config.floor_scale = True, 24
    assert [group.indices for group in group_requests(requests(4, 10, 18, 20), config)[0]] == [[0, 1], [2], [3]]


def test_a_model_that_has_diverged_is_not_remembered():
    model = build("LlamaConfig", **SMALL)
    model.lm_head.weight[5, 5] = torch.nan
    for cls in (HFBackend, FastBackend):
        answer(cls, model, requests(*MIXED))
    assert sharing._findings == suitability._findings == {}


LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}


def with_longrope(original: int) -> dict[str, Any]:
    """Another rotary table beyond so many tokens."""
    if IS_5:
        rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": original}
        return SMALL | {"original_max_position_embeddings": original, "rope_parameters": rope | LONGROPE}
    return SMALL | {"original_max_position_embeddings": original, "rope_scaling": {"rope_type": "longrope"} | LONGROPE}


@pytest.mark.parametrize("config_name", ["Phi3Config", "LlamaConfig"])
def test_the_longest_of_a_batch_does_not_choose_the_table_of_all(config_name, caplog):
    """Prompts below the length beyond which another table holds, beyond it, and with an answer that crosses it."""
    fields = with_longrope(24)
    if config_name == "Phi3Config" and not IS_5:
        fields = SMALL | {"original_max_position_embeddings": 24}
        fields["rope_scaling"] = {"type": "longrope"} | {
            name: LONGROPE[name] for name in ("short_factor", "long_factor")
        }
    model = build(config_name, **fields)
    asked = requests(4, 11, 40, 30, 21, 18, 21)
    assert table_boundaries(model.config) == [24]
    assert [(group.indices, group.use_cache) for group in group_requests(asked, model.config)[0]] == [
        ([0, 1, 5], True), ([4, 6], False), ([3, 2], True),
    ]  # fmt: skip
    with caplog.at_level(logging.DEBUG, "verl_valgen"):
        assert_right(model, asked)
    assert "Hugging Face's loop: an answer crosses a length beyond which the rotary tables are others" in caplog.text


def test_rows_of_one_table_leave_nothing_to_those_of_another():
    """A row that held more tokens than the next ones may; and a prompt that is one token beyond the length, so that it
    lies below without its last."""
    model = build("LlamaConfig", **with_longrope(24))
    asked = requests(40, 26, 25, 4, 9, 17)
    expected = [what_it_says(model, one) for one in asked]
    with torch.no_grad():
        for batch in (asked, asked[::-1]):
            answers = FastBackend(copy.deepcopy(model), None, 0, Limits(batch_size=2)).generate(batch)
            assert [one.output_ids for one in answers] == (expected if batch is asked else expected[::-1])


def test_tables_of_each_layer_type_count():
    config = build("LlamaConfig", **SMALL).config
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 24} | LONGROPE
    longer = rope | {"original_max_position_embeddings": 48}
    config.rope_parameters = {"full": rope, "sliding": {"rope_type": "default"}, "longer": longer}
    assert table_boundaries(config) == [24, 48]
    lengths = (10, 21, 30, 45, 60)
    groups = group_requests(requests(*lengths), config)[0]
    assert [[lengths[i] for i in group.indices] for group in groups if group.use_cache] == [[10], [30], [60]]
    assert [[lengths[i] for i in group.indices] for group in groups if not group.use_cache] == [[21], [45]]
