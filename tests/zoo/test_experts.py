"""What is exported expert by expert is the model again, bit for bit, for every architecture that has experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from exports import randomize
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name
from zoo.configurations import configuration, names, shrunk

from verl_valgen.weights.empty import empty_from_config
from verl_valgen.weights.exported import ExportedCopy

IS_PACKED = transformers.__version__ >= "5"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_PACKED, reason="transformers 4 holds experts as checkpoints do"),
]

MODELS = Path(transformers.__file__).parent / "models"
_CLASS_OF_EXPERTS = re.compile(r"^class \w*(Expert|Mo[eE])\w*\(", re.MULTILINE)

WITH_IMAGES = {
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [32, 24],
        "text_config.moe_num_experts": 4,
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "qwen3_vl_moe": {},
}
"""Architectures whose conversions are like no other's: two kinds of experts from one list; a transposition."""


@cache
def may_have_experts(model_type: str) -> bool:
    """By the sources, which are read faster than a model is built."""
    files = (MODELS / model_type_to_module_name(model_type)).glob("modeling_*.py")
    return any(_CLASS_OF_EXPERTS.search(file.read_text(encoding="utf-8")) for file in files)


CANDIDATES = [name for name in names() if IS_PACKED and may_have_experts(name.partition(":")[0])]


def packed(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold all experts of a layer."""
    return [name for name, tensor in tensors.items() if tensor.dim() >= 3 and re.search(r"experts\.|moe\.", name)]


def exported_singly(model: PreTrainedModel) -> dict[str, Tensor]:
    """As transformers saves it; and in rows what it saves packed, the number behind the module's name."""
    from transformers.core_model_loading import revert_weight_conversion

    saved = revert_weight_conversion(model, dict(model.state_dict()))
    for name in packed(saved):
        place = re.search(r"experts\.|moe\.", name).end()
        saved |= {f"{name[:place]}{i}.{name[place:]}": row for i, row in enumerate(saved.pop(name))}
    return saved


def assert_exported_bit_for_bit(auto_class: type, config: PretrainedConfig) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            model = auto_class.from_config(config)
    except Exception as e:
        pytest.skip(f"transformers cannot build it: {e}")
    randomize(model)
    source = model.state_dict()
    if not any("expert" in name or "moe" in name for name in source):
        pytest.skip("has no experts")
    exported = exported_singly(model)
    assert not packed(exported)
    assert (len(exported) > len(source)) == bool(packed(source))  # DBRX has them below each other in matrices
    for tensors in (exported, source):
        copy = ExportedCopy(empty_from_config(auto_class, config, torch.float32), torch.device("cpu"), exporter="E")
        for name, tensor in tensors.items():
            copy.receive(name, tensor)
        found = copy.finish().state_dict()
        assert [name for name, tensor in source.items() if not torch.equal(found[name], tensor)] == []
        assert not copy.pending


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_architecture_with_experts(name):
    try:
        config = configuration(name)
    except LookupError as e:
        pytest.skip(str(e))
    assert_exported_bit_for_bit(AutoModelForCausalLM, config)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_architectures_with_images(name):
    if name not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        pytest.skip(f"not in transformers {transformers.__version__}")
    config = shrunk(CONFIG_MAPPING[name], WITH_IMAGES[name])
    assert_exported_bit_for_bit(transformers.AutoModelForImageTextToText, config)


def test_none_is_passed_over():
    assert {"qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss", "dbrx", "jetmoe", "gemma4_text:moe"} <= set(CANDIDATES)
