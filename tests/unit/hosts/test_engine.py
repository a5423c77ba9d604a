"""What every engine's configuration says in a way of its own, and which models are looked into."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaConfig, LlamaForCausalLM

from verl_valgen.hosts.engine import EngineHost

SIZES: dict[str, Any] = {
    "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2
}  # fmt: skip


class OfFSDP2(FSDPModule, nn.Module):
    def __new__(cls) -> OfFSDP2:
        return object.__new__(cls)


def host(**engine_config: object) -> EngineHost:
    engine = SimpleNamespace(
        module=OfFSDP2(), is_mp_src_rank_with_outputs=lambda: True, get_data_parallel_rank=lambda: 0
    )
    config = SimpleNamespace(**{"strategy": "fsdp2", **engine_config})
    return EngineHost(engine, SimpleNamespace(tokenizer=None), config, "cpu")


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ({}, torch.bfloat16),  # Megatron
        ({"mixed_precision": None}, torch.bfloat16),
        ({"mixed_precision": {"param_dtype": "fp32"}}, torch.float32),
        ({"mixed_precision": OmegaConf.create({"param_dtype": "fp16"})}, torch.float16),
        ({"mixed_precision": {"reduce_dtype": "fp32"}}, torch.bfloat16),
        ({"mixed_precision": True}, torch.bfloat16),  # VeOmni
        ({"mixed_precision": False}, torch.bfloat16),  # torchtitan
        ({"mp_param_dtype": "fp32"}, torch.float32),  # automodel
    ],
)
def test_the_dtype_of_an_engine(engine, dtype):
    assert host(**engine).compute_dtype is dtype


@pytest.mark.parametrize(("strategy", "is_fsdps"), [("fsdp2", True), ("veomni", False), ("automodel", False)])
def test_a_model_of_another_engine_is_not_looked_into_although_fsdp2_shards_it(strategy, is_fsdps):
    """VeOmni splits experts among ranks in a way that FSDP2 does not know."""
    assert host(strategy=strategy).is_sharded_by_fsdp is is_fsdps


@pytest.mark.parametrize("keep", [True, False])
def test_weights_of_another_engine_are_streamed_as_it_exports_them(keep):
    """In the dtype that is asked for. A rank that wants none takes part."""
    config = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
    weights, taken = LlamaForCausalLM(config).state_dict(), []
    own = host(strategy="veomni")
    own.verl_model_config = SimpleNamespace(hf_config=config, trust_remote_code=False)
    own.engine.get_per_tensor_param = lambda: ((taken.append(pair[0]) or pair for pair in weights.items()), None)
    found = own.stream(dict, torch.bfloat16, keep=keep)
    assert taken == list(weights)
    assert (found is not None) == keep
    for name, tensor in (found or {}).items():
        assert torch.equal(tensor, weights[name].to(torch.bfloat16))
    assert found is None or found.keys() == weights.keys()


def test_weights_of_fsdps_engine_are_streamed_as_the_model_has_them():
    config = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
    own = host()
    own.model = LlamaForCausalLM(config)
    found = own.stream(dict, torch.float32, keep=True)
    assert found is not None
    assert found.keys() == own.model.state_dict().keys()
