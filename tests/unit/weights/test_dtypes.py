"""A copy has every tensor in the dtype and of the value that `from_pretrained(dtype=...)` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from verl_valgen.weights.empty import empty_from_config
from verl_valgen.weights.gather import gather
from verl_valgen.weights.plain_copy import PlainCopy

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
MODELS = {
    "glm4_moe": {**EXPERTS, "first_k_dense_replace": 1},  # a buffer of named dtype
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0},
    "deepseek_v3": {
        **EXPERTS, "first_k_dense_replace": 1, "head_dim": 8, "q_lora_rank": None, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    },
    "falcon_h1": {  # buffers of the default dtype that no state dict holds
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_n_groups": 2, "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
    "gpt_oss": {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},  # norms, in float16
    "apertus": {},  # buffers of a dtype that the constructor gets
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},  # a buffer that scales embeddings
}  # fmt: skip
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
KEPT = {
    ("glm4_moe", BFLOAT16): "model.layers.1.mlp.gate.e_score_correction_bias",
    ("ernie4_5_moe", BFLOAT16): "model.layers.1.mlp.gate.weight",
    ("gpt_oss", FLOAT16): "model.layers.1.input_layernorm.weight",
}
CASES = [(name, BFLOAT16) for name in MODELS] + [("gpt_oss", FLOAT16)]


def source_model(name: str) -> Any:
    """A model with weights far from a constructor's: what a router adds to its scores is 8 +- 0.05."""
    config = CONFIG_MAPPING[name](**{**SIZES, **MODELS[name]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in key and ("correction" in key or "moe_statics" in key):
                tensor.normal_(8, 0.05)
            elif isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
                tensor.normal_(0, 0.2)
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits


def assert_same(copy: Any, loaded: Any) -> None:
    own, expected = tensors(copy), tensors(loaded)
    assert {name: tensor.dtype for name, tensor in own.items()} == {name: t.dtype for name, t in expected.items()}
    assert [name for name in own if not torch.equal(own[name], expected[name])] == []
    assert torch.equal(logits(copy), logits(loaded))


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in CASES])
def test_a_copy_is_what_transformers_loads(tmp_path: Path, name, dtype):
    source = source_model(name)
    source.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert_same(gather(source, dtype=dtype, device=CPU, keep=True), loaded)
    assert torch.get_default_dtype() is torch.float32
    if (name, dtype) in KEPT:
        assert tensors(loaded)[KEPT[name, dtype]].dtype is torch.float32


@pytest.mark.parametrize("name", ["ernie4_5_moe", "apertus"])  # whose constructor names bfloat16 in some releases
def test_a_copy_in_float32_is_the_model(name):
    source = source_model(name)
    assert_same(gather(source, dtype=torch.float32, device=CPU, keep=True), source)


@pytest.mark.parametrize("name", ["ernie4_5_moe", "falcon_h1"])
def test_a_copy_of_a_stream_of_weights_has_the_same_dtypes(tmp_path: Path, name):
    source = source_model(name)
    source.save_pretrained(tmp_path)
    # A configuration from the hub may ask for a dtype itself.
    source.config.dtype = torch.float16
    copy = PlainCopy(empty_from_config(AutoModelForCausalLM, source.config, BFLOAT16), CPU)
    for key, tensor in source.state_dict().items():
        copy.receive(key, tensor)
    assert_same(copy.finish(), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BFLOAT16).eval())
