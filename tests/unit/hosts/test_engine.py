"""What every engine's configuration says in a way of its own, and which models are looked into."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.fsdp import FSDPModule

from verl_valgen.hosts.engine import EngineHost


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
