"""An engine that verl's registry knows, with experts of every kind: its copy is the model, and answers as the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import assets
import pytest
import torch
import torch.distributed as dist
from checkpoints import plain_greedy
from distributed.testing import run_distributed
from end_to_end.trainer import HAS_ENGINES
from exports import randomize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from unit.weights.test_exported import CONFIGS

from verl_valgen.collectives import agree
from verl_valgen.hosts.cpu import engine_support
from verl_valgen.hosts.engine import EngineHost
from verl_valgen.records import Request
from verl_valgen.rounds.proven import ProvenAnswerer
from verl_valgen.settings.load import GenerationSettings

pytestmark = pytest.mark.skipif(not HAS_ENGINES, reason="verl.trainer.fsdp_sft_trainer has no engines")

PROMPT = [7, 12, 30, 21, 5]
MAX_NEW_TOKENS = 8
VARIED = {"no_repeat_ngram_size": 1}  # else random weights repeat their last token
ARCHITECTURES = ["qwen3_moe", "qwen3_moe-tied", "deepseek_v3", "mixtral", "gpt_oss"]


def write_model(name: str, directory: Path) -> None:
    """With random numbers in every tensor, buffers too, and a tokenizer."""
    assets.write_model(directory, hidden_size=16, num_hidden_layers=1)
    tokenizer, config = AutoTokenizer.from_pretrained(directory), CONFIGS[name]()
    config.vocab_size, config.eos_token_id, config.pad_token_id = len(tokenizer), tokenizer.eos_token_id, None
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    for parameter in model.parameters():  # or else rounding decides
        parameter.data.mul_(0.3)
    model.save_pretrained(directory)


def registered_engine(directory: Path) -> tuple[Any, Any, Any]:
    """What verl's registry makes of the model, ready to train, and its configurations."""
    from end_to_end.small_engine import ListEngineConfig
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    model_config = HFModelConfig(
        path=str(directory), override_config={"attn_implementation": "eager"}, use_remove_padding=False
    )
    engine_config = ListEngineConfig(use_torch_compile=False)
    engine = EngineRegistry.new(
        "language_model",
        "list",
        model_config=model_config,
        engine_config=engine_config,
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine, model_config, engine_config


def differing(copy: PreTrainedModel, source: PreTrainedModel) -> list[str]:
    found, expected = copy.state_dict(), source.state_dict()
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def of_one(directory: Path) -> dict[str, Any]:
    engine, model_config, engine_config = registered_engine(directory)
    host = EngineHost(engine, model_config, engine_config, "cpu")
    source = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    copy = host.gather(torch.float32, keep=dist.get_rank() == 1)
    saved = load_file(directory / "model.safetensors")
    streamed = host.stream(
        lambda pairs: {name: torch.equal(t, saved[name]) for name, t in pairs}, torch.float32, keep=True
    )
    settings = GenerationSettings(enabled=True, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, extra=VARIED)
    requests = [Request(PROMPT, (0, 0), settings.parameters)]
    answers = ProvenAnswerer(host, settings)(requests if host.is_logging_rank else None)
    return {
        "module": type(engine.module).__name__,
        "differing": copy and differing(copy, source),
        "is_as_saved": streamed == dict.fromkeys(saved, True),
        "has_split": any(".experts.3." in name for name in saved),
        "answer": answers and answers.completions[0].output_ids,
        "verified": answers and answers.verified,
        "expected": plain_greedy(source, PROMPT, MAX_NEW_TOKENS, **VARIED),
        "met": agree(True, torch.device("cpu")),
    }


def of_each(directory: Path) -> dict[str, Any]:
    with engine_support():
        return {name: of_one(directory / name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("engines")
    for name in ARCHITECTURES:
        write_model(name, directory / name)
    return run_distributed(of_each, 2, directory, directory)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_it_exports_is_the_model_bit_for_bit_and_answers_as_the_model(outcomes, name):
    first, second = (outcome[name] for outcome in outcomes)
    assert first["module"] == "list", "the model can be seen"
    assert (first["differing"], second["differing"]) == (None, [])
    assert first["is_as_saved"]
    assert second["is_as_saved"]
    assert first["has_split"] == (name != "gpt_oss")
    assert first["answer"] == first["expected"]
    assert len(set(first["answer"])) > 2
    assert first["verified"] is True
    assert second["answer"] is None
    assert first["met"]
    assert second["met"]
