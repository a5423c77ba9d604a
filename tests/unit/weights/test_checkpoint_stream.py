"""The stream of weights is the checkpoint that transformers would write of the copy, name for name and bit for bit."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exports import randomize
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from verl_valgen.weights import checkpoint_stream as checkpoint_stream_module
from verl_valgen.weights.checkpoint import Checkpoint
from verl_valgen.weights.checkpoint_stream import stream, stream_exported
from verl_valgen.weights.empty import empty_from_config
from verl_valgen.weights.gather import gather
from verl_valgen.weights.merged import MergedWeights

HAS_PACKED_EXPERTS = int(transformers.__version__.partition(".")[0]) >= 5
packed_experts = pytest.mark.skipif(not HAS_PACKED_EXPERTS, reason="transformers 4 holds experts as checkpoints do")

CPU = torch.device("cpu")
HIDDEN = 16
SIZES: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {**SIZES, "num_experts_per_tok": 2, "head_dim": 8}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=24, tie_word_embeddings=True),
    "deepseek_v3": lambda: DeepseekV3Config(
        **EXPERTS, n_routed_experts=4, moe_intermediate_size=24, first_k_dense_replace=1, n_group=1, topk_group=1,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "mixtral": lambda: MixtralConfig(**EXPERTS, num_local_experts=4),
    "gpt_oss": lambda: GptOssConfig(**EXPERTS, num_local_experts=4),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config={**SIZES, "vocab_size": 160, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 1, "hidden_size": HIDDEN, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": HIDDEN
        },
    ),
}  # fmt: skip
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("qwen2", {"target_modules": "all-linear"}),
    "lora, tied": ("qwen2-tied", {"target_modules": "all-linear"}),
    "lora, of experts": ("qwen3_moe", {"target_modules": ["q_proj", "o_proj"]}),
    "lora of packed experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "lora of a tied head": ("qwen2-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "dora": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "with new biases": ("qwen2", {"target_modules": ["o_proj"], "lora_bias": True}),
    "a trained head": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a trained head that was tied": ("qwen2-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


def auto_class(name: str) -> Any:
    return AutoModelForImageTextToText if "_vl" in name else AutoModelForCausalLM


def build(name: str) -> nn.Module:
    model = auto_class(name).from_config(CONFIGS[name]())
    randomize(model)
    return model


def with_adapter(name: str) -> nn.Module:
    model, config = ADAPTERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied layers, and of biases
        peft_model = get_peft_model(build(model), LoraConfig(**LORA, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)
    return peft_model


def taken(pairs: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in pairs:
        assert name not in found, f"{name} comes twice"
        assert type(tensor) is Tensor
        found[name] = tensor.clone()
    return found


def streamed(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    found = stream(model, taken, dtype=dtype, device=CPU, keep=True)
    assert found is not None
    return found


def saved(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The checkpoint that transformers writes of the copy of a model."""
    copy = gather(model, dtype=dtype, device=CPU, keep=True)
    assert copy is not None
    copy.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if found[name].dtype is not tensor.dtype] == []
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_stream_is_the_checkpoint(tmp_path, name, dtype):
    model = build(name)
    assert_same(streamed(model, dtype), saved(model, tmp_path, dtype))


NAMES = {
    "qwen2-tied": ("model.embed_tokens.weight", "lm_head.weight"),
    "qwen3_moe": ("model.layers.1.mlp.experts.3.gate_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"),
    "mixtral": ("model.layers.1.block_sparse_moe.experts.3.w2.weight", "model.layers.1.mlp.experts.down_proj"),
    "deepseek_v3": ("model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.1.mlp.experts.gate_up_proj"),
    "gpt_oss": ("model.layers.1.mlp.experts.gate_up_proj", "lm_head.missing"),
    "qwen2_5_vl": ("visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_published_checkpoints(name):
    has, has_not = NAMES[name]
    found = streamed(build(name))
    assert has in found
    assert has_not not in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_in_the_weights_as_in_those_of_the_copy(tmp_path, name, dtype):
    if "packed" in name and not HAS_PACKED_EXPERTS:
        pytest.skip("transformers 4 has no packed experts")
    model = with_adapter(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert_same(streamed(model, dtype), saved(model, tmp_path, dtype))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_from_files_is_streamed_as_they_have_it(tmp_path, name):
    """transformers 5 remembers what it converted."""
    build(name).save_pretrained(tmp_path)
    model = auto_class(name).from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert_same(streamed(model), load_file(tmp_path / "model.safetensors"))


def held_bytes(merging: MergedWeights) -> int:
    return sum(p.numel() * p.element_size() for p in merging.copy.model.parameters() if not p.is_meta)


def test_never_more_is_held_than_a_layer_with_adapters(monkeypatch):
    model = with_adapter("lora")
    made: list[MergedWeights] = []

    def make(*args: Any, **kwargs: Any) -> MergedWeights:
        made.append(MergedWeights(*args, **kwargs))
        return made[0]

    monkeypatch.setattr(checkpoint_stream_module, "MergedWeights", make)
    most = 0

    def consume(pairs: Iterator[tuple[str, Tensor]]) -> None:
        nonlocal most
        for _ in pairs:
            most = max(most, held_bytes(made[0]))

    stream(model, consume, dtype=torch.float32, device=CPU, keep=True)
    assert most == 4 * (HIDDEN * 24 + 3 * (HIDDEN + 24))
    assert held_bytes(made[0]) == 0


def test_what_has_no_adapters_passes_without_a_copy():
    model = build("qwen2")
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def pointers(pairs: Iterator[tuple[str, Tensor]]) -> set[int]:
        return {tensor.data_ptr() for _, tensor in pairs}

    assert stream(model, pointers, dtype=torch.float32, device=CPU, keep=True) == own


def test_a_rank_that_keeps_nothing_is_not_asked():
    assert stream(build("qwen2"), pytest.fail, dtype=torch.float32, device=CPU, keep=False) is None


class Tripped(Exception):
    """Planted."""


class Watched:
    """What is gathered, by name, and whether what a consumer held was gone at the last of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.held: weakref.ref | None = None
        self.is_gone = False
        self.full_parameters = checkpoint_stream_module.full_parameters
        monkeypatch.setattr(checkpoint_stream_module, "full_parameters", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.full_parameters(*args, **kwargs):
            self.names.append(name)
            yield name, tensor
            self.is_gone = self.held is not None and self.held() is None


def test_the_rest_is_gathered_where_a_consumer_stops(monkeypatch):
    model, watched = with_adapter("lora"), Watched(monkeypatch)
    first = stream(model, lambda pairs: next(pairs)[0], dtype=torch.float32, device=CPU, keep=True)
    assert first == "model.embed_tokens.weight"
    assert watched.names == [name for name, _ in model.named_parameters()]


def test_the_rest_is_gathered_where_a_consumer_fails_and_what_it_held_is_gone(monkeypatch):
    model, watched = with_adapter("lora"), Watched(monkeypatch)

    def fail(pairs: Iterator[tuple[str, Tensor]]) -> None:
        loaded = nn.Linear(2, 2)
        watched.held = weakref.ref(loaded)
        for name, _ in pairs:
            if "layers.1" in name:
                try:
                    raise KeyError(name)
                except KeyError as e:
                    raise Tripped from e

    gc.disable()
    try:
        with pytest.raises(Tripped):
            stream(model, fail, dtype=torch.float32, device=CPU, keep=True)
    finally:
        gc.enable()
    assert watched.names == [name for name, _ in model.named_parameters()]
    assert watched.is_gone


def test_a_parameter_that_never_came_is_named(monkeypatch):
    full_parameters = checkpoint_stream_module.full_parameters

    def short(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return (pair for pair in full_parameters(*args, **kwargs) if "norm" not in pair[0])

    monkeypatch.setattr(checkpoint_stream_module, "full_parameters", short)
    with pytest.raises(RuntimeError, match=r"5 parameters were not gathered, model\.layers\.0\.input_layernorm"):
        streamed(build("qwen2"))


def exported(name: str, pairs: list[tuple[str, Tensor]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    found = stream_exported(
        lambda: (pair for pair in pairs),
        lambda: empty_from_config(auto_class(name), CONFIGS[name](), dtype),
        taken, device=CPU, keep=True,
    )  # fmt: skip
    assert found is not None
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_what_an_engine_exports_is_handed_on_as_the_checkpoint_has_it(tmp_path, name):
    """Under the checkpoint's names, or the model's own; tied weights twice, perhaps."""
    model = build(name)
    expected = saved(model, tmp_path, torch.bfloat16)
    whole = saved(model, tmp_path / "float32")
    assert_same(exported(name, list(whole.items()), torch.bfloat16), expected)
    assert_same(exported(name, list(model.state_dict().items()), torch.bfloat16), expected)


@packed_experts
def test_tensors_that_are_made_of_several_are_held_until_all_are_there():
    """None of the usual models has such: one whose checkpoints hold three matrices in one."""
    from transformers.core_model_loading import Chunk, WeightConverter

    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    randomize(model)
    projections = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    model._weight_conversions = [WeightConverter("self_attn.qkv.weight", projections, [Chunk(0)])]
    found = streamed(model)
    parts = [model.state_dict()[f"model.layers.1.{name}"] for name in projections]
    assert torch.equal(found["model.layers.1.self_attn.qkv.weight"], torch.cat(parts))
    assert not any("q_proj" in name for name in found)
    checkpoint = Checkpoint(model)
    for part in projections[:2]:
        assert list(checkpoint.convert(f"model.layers.1.{part}", torch.zeros(HIDDEN, HIDDEN))) == []
    with pytest.raises(RuntimeError, match=r"q_proj\.weight came without the 1 others"):
        checkpoint.require_all()
