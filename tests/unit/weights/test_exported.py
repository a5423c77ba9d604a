"""What an engine exports becomes the model bit for bit, however it packs the experts; what does not fit is named."""

from __future__ import annotations

import gc
import logging
import random
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from exports import as_checkpoints_have, by_expert, randomize
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from verl_valgen.weights import routes
from verl_valgen.weights.empty import empty_from_config
from verl_valgen.weights.exported import ExportedCopy
from verl_valgen.weights.gather import collect

HAS_PACKED_EXPERTS = int(transformers.__version__.partition(".")[0]) >= 5
packed_experts = pytest.mark.skipif(not HAS_PACKED_EXPERTS, reason="transformers 4 holds experts as checkpoints do")

NUM_EXPERTS, HIDDEN, INTERMEDIATE = 4, 16, 24
SIZES: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8,
}  # fmt: skip
QWEN3_MOE = {**SIZES, "num_experts": NUM_EXPERTS, "moe_intermediate_size": INTERMEDIATE}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**QWEN3_MOE),
    "qwen3_moe-tied": lambda: Qwen3MoeConfig(**QWEN3_MOE, tie_word_embeddings=True),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZES, n_routed_experts=NUM_EXPERTS, moe_intermediate_size=INTERMEDIATE, first_k_dense_replace=1, n_group=1,
        topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=NUM_EXPERTS),
    "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=NUM_EXPERTS),
}  # fmt: skip
EXPERT_BYTES = 4 * HIDDEN * INTERMEDIATE


def build(name: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    randomize(model)
    return model


def exported(model: PreTrainedModel, name: str) -> list[tuple[str, Tensor]]:
    """Its state dict as a checkpoint has it: tied weights once, GPT-OSS' experts packed."""
    tensors = [pair for pair in model.state_dict().items() if "tied" not in name or pair[0] != "lm_head.weight"]
    return list(as_checkpoints_have(model.config.model_type, tensors))


def new_copy(name: str, dtype: torch.dtype = torch.float32) -> ExportedCopy:
    return ExportedCopy(
        empty_from_config(AutoModelForCausalLM, CONFIGS[name](), dtype), torch.device("cpu"), exporter="SomeEngine"
    )


def fill(copy: ExportedCopy, tensors: list[tuple[str, Tensor]]) -> int:
    """Streams tensors that are overwritten when the next one is asked for; returns the most bytes held meanwhile."""
    most = 0
    for name, tensor in tensors:
        lent = tensor.clone()
        copy.receive(name, lent)
        lent.fill_(7)
        most = max(most, copy.num_pending_bytes)
    return most


def differing(copy: ExportedCopy, source: PreTrainedModel) -> list[str]:
    found = copy.finish().state_dict()
    expected = source.state_dict()
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor.to(found[name].dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_experts_exported_one_by_one_become_the_model(name, dtype):
    source, copy = build(name), new_copy(name, dtype)
    tensors = exported(source, name)
    assert name == "gpt_oss" or any(".experts.3." in exported_name for exported_name, _ in tensors)
    fill(copy, tensors)
    assert differing(copy, source) == []


@packed_experts
@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_holds_is_taken_as_it_is(name):
    source, copy = build(name), new_copy(name)
    assert fill(copy, list(source.state_dict().items())) == 0
    assert differing(copy, source) == []


ORDERS: dict[str, tuple[Callable[[str], Any], int]] = {
    "an expert after the other": (lambda name: name.replace("down_proj", "z"), 1),
    "all gates of a layer first": (lambda name: ("down" in name, "up" in name), NUM_EXPERTS),
    "downs first": (lambda name: "down" not in name, 1),
}


@packed_experts
@pytest.mark.parametrize("order", ORDERS)
def test_never_more_is_held_than_a_layers_gates(order):
    key, num_held = ORDERS[order]
    source, copy = build("qwen3_moe"), new_copy("qwen3_moe")
    tensors = exported(source, "qwen3_moe")
    most = 0
    for layer in range(2):
        own = [pair for pair in tensors if f".layers.{layer}." in pair[0]]
        most = max(most, fill(copy, sorted(own, key=lambda pair: key(pair[0]))))
    fill(copy, [pair for pair in tensors if ".layers." not in pair[0]])
    assert most == num_held * EXPERT_BYTES
    assert differing(copy, source) == []


def test_any_order_and_a_tensor_that_comes_twice_change_nothing():
    source, copy = build("mixtral"), new_copy("mixtral")
    tensors = exported(source, "mixtral")
    tensors += tensors[:20]
    random.Random(0).shuffle(tensors)
    fill(copy, tensors)
    assert differing(copy, source) == []


@packed_experts
def test_a_gate_that_comes_twice_is_no_up():
    copy = new_copy("qwen3_moe")
    gate = next(pair for pair in exported(build("qwen3_moe"), "qwen3_moe") if "gate_proj" in pair[0])
    fill(copy, [gate, gate])
    assert copy.num_pending_bytes == EXPERT_BYTES
    assert not copy.rows


@packed_experts
def test_rows_of_experts_that_checkpoints_hold_packed():
    """As VeOmni exports GPT-OSS from experts that several ranks share."""
    source, copy = build("gpt_oss"), new_copy("gpt_oss")
    for name, tensor in source.state_dict().items():
        rows = enumerate(tensor) if ".experts." in name else ()
        fill(copy, [(name.replace(".experts.", f".experts.{i}."), row) for i, row in rows] or [(name, tensor)])
    assert differing(copy, source) == []


@packed_experts
def test_the_usual_names_where_checkpoints_hold_experts_packed_and_the_other_way_round(monkeypatch):
    """Llama 4 keeps (experts, in, out) in its checkpoints too; an engine that splits them has (out, in)."""
    monkeypatch.setitem(
        CONFIGS,
        "llama4",
        lambda: Llama4TextConfig(**SIZES, num_local_experts=NUM_EXPERTS, intermediate_size_mlp=INTERMEDIATE),
    )
    source, copy = build("llama4"), new_copy("llama4")
    tensors = list(by_expert(turned(source), mlp="mlp"))
    assert sum(".experts.3." in name for name, _ in tensors) > 0
    fill(copy, tensors)
    assert differing(copy, source) == []


def turned(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return [(name, t.transpose(1, 2) if ".experts." in name else t) for name, t in model.state_dict().items()]


@packed_experts
def test_an_experts_matrix_that_could_lie_either_way_is_an_error(monkeypatch):
    """One engine has (out, in), another the model's own (in, out): of equal numbers nobody can tell."""
    sizes = SIZES | {"intermediate_size": HIDDEN}
    monkeypatch.setitem(
        CONFIGS,
        "square",
        lambda: Llama4TextConfig(**sizes, num_local_experts=NUM_EXPERTS, intermediate_size_mlp=HIDDEN),
    )
    tensors = [pair for pair in by_expert(turned(build("square")), mlp="mlp") if ".experts." in pair[0]]
    assert {tensor.shape for _, tensor in tensors} == {(HIDDEN, HIDDEN)}
    for name, tensor in tensors:
        with pytest.raises(ValueError, match=rf"SomeEngine exports {re.escape(name)}, square, so that it could lie"):
            new_copy("square").receive(name, tensor)
    source, copy = build("square"), new_copy("square")
    fill(copy, list(source.state_dict().items()))
    assert differing(copy, source) == []


class Modules(PreTrainedModel):
    """Of Qwen3-MoE's kind, with a module for every expert, as models of the hub's own code have them."""

    config_class = Qwen3MoeConfig

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__(config)
        expert = {"gate_proj": (HIDDEN, INTERMEDIATE), "up_proj": (HIDDEN, INTERMEDIATE)}
        expert["down_proj"] = (INTERMEDIATE, HIDDEN)
        self.mlp = nn.Module()
        self.mlp.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in expert.items()})
            for _ in range(NUM_EXPERTS)
        )


@packed_experts
def test_packed_experts_are_unpacked_for_a_model_that_holds_modules():
    source = Modules(CONFIGS["qwen3_moe"]())
    with torch.device("meta"):
        copy = ExportedCopy(Modules(CONFIGS["qwen3_moe"]()), torch.device("cpu"), exporter="SomeEngine")
    gates, ups, downs = (
        torch.stack([expert[projection].weight for expert in source.mlp.experts])
        for projection in ("gate_proj", "up_proj", "down_proj")
    )
    fill(copy, [("mlp.experts.gate_up_proj", torch.cat([gates, ups], 1)), ("mlp.experts.down_proj", downs)])
    assert differing(copy, source) == []


def test_what_transformers_leaves_out_is_left_out():
    """Tables that it computes; in transformers 5 DeepSeek-V3's 62nd layer, which predicts a second token."""
    source, copy = build("deepseek_v3"), new_copy("deepseek_v3")
    left_out = [("model.rotary_emb.inv_freq", torch.zeros(4))]
    if HAS_PACKED_EXPERTS:
        left_out.append(("model.layers.61.embed_tokens.weight", torch.zeros(37, HIDDEN)))
    fill(copy, [*left_out, *exported(source, "deepseek_v3")])
    assert differing(copy, source) == []


WRONG = {
    "another name": (
        ("model.layers.1.mlp.experts.2.gate_project.weight", (INTERMEDIATE, HIDDEN)),
        r"SomeEngine exports model\.layers\.1\.mlp\.experts\.2\.gate_project\.weight, which has no place in "
        r"Qwen3MoeForCausalLM; the nearest name is model\.layers\.1\.mlp\.experts\.2\.gate_proj\.weight",
    ),
    "adapters": (
        ("model.layers.1.self_attn.q_proj.lora_A.weight", (8, HIDDEN)),
        r"SomeEngine exports model\.layers\.1\.self_attn\.q_proj\.lora_A\.weight, which has no place in "
        r"Qwen3MoeForCausalLM; the nearest name is model\.layers\.1\.self_attn\.q_proj\.weight",
    ),
    "a share of the vocabulary": (
        ("model.embed_tokens.weight", (40, HIDDEN)),
        r"SomeEngine exports model\.embed_tokens\.weight as \(40, 16\), not as \(37, 16\)",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_an_error_that_names_engine_name_and_nearest(kind):
    (name, shape), message = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        new_copy("qwen3_moe").receive(name, torch.zeros(shape))


@packed_experts
def test_an_expert_too_many_and_shares_of_an_expert_are_errors():
    gate, up = (f"model.layers.0.mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up"))
    with pytest.raises(ValueError, match=r"experts\.9\.gate_proj.* of Qwen3MoeForCausalLM has 4 experts"):
        new_copy("qwen3_moe").receive(gate.format(9), torch.zeros(INTERMEDIATE, HIDDEN))
    copy = new_copy("qwen3_moe")
    copy.receive(gate.format(0), torch.zeros(INTERMEDIATE, HIDDEN // 2))
    with pytest.raises(ValueError, match=r"SomeEngine exports .*0\.gate_proj\.weight \(24, 8\), .*which do not make"):
        copy.receive(up.format(0), torch.zeros(INTERMEDIATE, 2 * HIDDEN))


@packed_experts
def test_want_of_memory_is_told_as_what_it_is(monkeypatch):
    def convert(*args: Any) -> Any:
        if not any(tensor.is_meta for _, tensor in args[1].values()):
            raise torch.OutOfMemoryError("planted")
        return routes.convert(*args)

    monkeypatch.setattr("verl_valgen.weights.exported.convert", convert)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        fill(new_copy("qwen3_moe"), exported(build("qwen3_moe"), "qwen3_moe"))


MISSING = {
    "lm_head.weight": r"SomeEngine did not export lm_head\.weight of Qwen3MoeForCausalLM; the nearest name is ",
    "model.layers.1.mlp.experts.2.up_proj.weight": (
        r"SomeEngine did not export all that makes model\.layers\.1\.mlp\.experts\.gate_up_proj of "
        r"Qwen3MoeForCausalLM: model\.layers\.1\.mlp\.experts\.2\.gate_proj\.weight came without what belongs to it"
    ),
    "model.layers.1.mlp.experts.3.down_proj.weight": (
        r"SomeEngine did not export expert 3 \(3 of 4 came\) of model\.layers\.1\.mlp\.experts\.down_proj of Qwen3Moe"
    ),
}


@packed_experts
@pytest.mark.parametrize("missing", MISSING)
def test_what_never_came_is_named(missing):
    copy = new_copy("qwen3_moe")
    fill(copy, [pair for pair in exported(build("qwen3_moe"), "qwen3_moe") if pair[0] != missing])
    with pytest.raises(RuntimeError, match=MISSING[missing]):
        copy.finish()


def test_a_buffer_that_never_came_is_told(caplog):
    source, copy = build("deepseek_v3"), new_copy("deepseek_v3")
    missing = "model.layers.1.mlp.gate.e_score_correction_bias"
    fill(copy, [pair for pair in exported(source, "deepseek_v3") if pair[0] != missing])
    with caplog.at_level(logging.WARNING, "verl_valgen"):
        assert differing(copy, source) == [missing]
    assert f"SomeEngine did not export the buffer {missing} of DeepseekV3ForCausalLM" in caplog.text


@packed_experts
def test_what_fails_in_a_conversion_frees_the_copy_at_once(monkeypatch):
    """An error has others behind it, and their frames hold the model; the rest of the export still comes."""

    def convert(*args: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr("verl_valgen.weights.exported.convert", convert)
    models, are_alive = [], []

    def copy() -> ExportedCopy:
        copy = new_copy("qwen3_moe")
        models.append(weakref.ref(copy.model))
        return copy

    def parameters(uncast: Any) -> Any:
        for pair in exported(build("qwen3_moe"), "qwen3_moe"):
            yield pair
            are_alive.append(models[0]() is not None)

    gc.disable()
    try:
        with pytest.raises(ValueError, match="which do not make"):
            collect(parameters, copy, dtype=torch.float32, device=torch.device("cpu"), keep=True)
    finally:
        gc.enable()
    assert are_alive[0]
    assert not are_alive[-1]


def test_names_of_a_checkpoint_whose_class_renames_them():
    """Of models with images transformers has moved the parts, and checkpoints keep the old names."""
    text = {
        "vocab_size": 160, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": HIDDEN, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": HIDDEN}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    model: Any = empty_from_config(transformers.AutoModelForImageTextToText, config, torch.float32)
    copy = ExportedCopy(model, torch.device("cpu"), exporter="SomeEngine")
    weights = {
        "visual.merger.ln_q.weight": "model.visual.merger.ln_q.weight",
        "model.layers.0.self_attn.o_proj.weight": "model.language_model.layers.0.self_attn.o_proj.weight",
    }
    for name, own in weights.items():
        copy.receive(name, torch.full(model.state_dict()[own].shape, 3.0))
        assert model.state_dict()[own].eq(3).all()
