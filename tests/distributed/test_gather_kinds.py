"""Sharded, a model gives the copy that it gives whole: adapters on tied layers, tensors that stay in float32, and more.

What that copy must be is tested on one rank, in tests/unit/weights.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.test_gather import SIZES, differences, wrap
from distributed.testing import run_distributed
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from verl_valgen.weights import gather as gather_module
from verl_valgen.weights.gather import gather

CPU = torch.device("cpu")


class RandomLlama(LlamaForCausalLM):
    """Draws in its constructor, by functions that take no notice of the meta device."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.normal(1, 0.1, size=(16,)))
        self.register_buffer("unsaved", torch.normal(0, 1, size=(37,)), persistent=False)


TIED = (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True))
UNTIED = (LlamaForCausalLM, LlamaConfig(**SIZES))
EXPERTS = (GptOssForCausalLM, GptOssConfig(**SIZES, head_dim=4, num_local_experts=4))
KEPT = (  # the router in float32
    Ernie4_5_MoeForCausalLM,
    Ernie4_5_MoeConfig(**SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=0),
)
BUFFER = (
    Glm4MoeForCausalLM,
    Glm4MoeConfig(
        **SIZES, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1
    ),
)
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[tuple[Any, Any], dict[str, Any] | None]] = {
    "adapter on a tied head": (TIED, {"target_modules": ["q_proj", "lm_head"]}),
    "adapter on a tied embedding": (TIED, {"target_modules": ["embed_tokens"]}),
    "adapters with biases": (UNTIED, {"lora_bias": True}),
    "fused experts": (EXPERTS, {"target_parameters": FUSED, "target_modules": ["q_proj"]}),
    "trained tokens of a tied embedding": (TIED, {"trainable_token_indices": [1, 5, 9]}),
    "kept in float32": (KEPT, None),
    "a buffer in float32": (BUFFER, None),
    "drawn in the constructor": ((RandomLlama, LlamaConfig(**SIZES)), None),
}
# FSDP1 flattens a unit's parameters: those of one unit must all be trainable or all frozen. (So Ernie's correction is.)
FSDP2_ONLY = {"adapter on a tied embedding", "trained tokens of a tied embedding", "kept in float32"}
# verl loads the state dict once more into the sharded model, which torch does not do for a dictionary of parameters
# that stands in two places.
BY_TORCH_ALONE = {"trained tokens of a tied embedding"}


@torch.no_grad()
def build(name: str) -> nn.Module:
    """The same on every rank, but for what no checkpoint holds: that every rank has by itself."""
    (cls, config), adapter = CASES[name]
    torch.manual_seed(0)
    model = cls(config)
    if adapter is not None:
        defaults = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied layers, and of biases
            model = get_peft_model(model, LoraConfig(**(defaults | adapter)))
    for parameter in model.parameters():
        if parameter.requires_grad or adapter is None:  # some begin at zero, which no dtype rounds
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def gather_all(strategy: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    keep = dist.get_rank() == 1  # ranks that keep nothing build nothing, and know what comes uncast all the same
    if not keep:
        gather_module.empty_like = lambda *_: pytest.fail("a rank that keeps no copy builds one")
    for name in CASES:
        if strategy == "fsdp" and name in FSDP2_ONLY:
            continue
        model = build(name)
        wrapped = fully_shard(model) if name in BY_TORCH_ALONE else wrap(model, strategy)
        for dtype in (torch.float32, torch.bfloat16):
            plain = gather(wrapped, dtype=dtype, device=CPU, keep=keep)
            if plain is not None:
                found[f"{name}, {dtype}"] = plain
    return found


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_a_sharded_model_gives_the_copy_that_it_gives_whole(tmp_path: Path, strategy):
    nothing, copies = run_distributed(gather_all, 2, tmp_path, strategy)
    assert nothing == {}
    assert len(copies) == 2 * (len(CASES) - (len(FSDP2_ONLY) if strategy == "fsdp" else 0))
    for label, plain in copies.items():
        name, _, dtype = label.rpartition(", torch.")
        whole = gather(build(name), dtype=getattr(torch, dtype), device=CPU, keep=True)
        exact = gather(build(name), dtype=torch.float32, device=CPU, keep=True)
        with torch.no_grad():
            for own, value in zip(tensors(whole), tensors(exact), strict=True):
                own.copy_(value)  # rounded once
        assert differences(plain, whole) == [], label
        assert plain.config.tie_word_embeddings == whole.config.tie_word_embeddings, label


def tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
