from __future__ import annotations

import os
from pathlib import Path

import assets as small
import pytest
import torch
from end_to_end.trainer import HAS_ENGINES, Assets
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, Qwen2Config

SHAPE = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
"""Qwen2's of 0.5B parameters; with the tests' vocabulary of a hundred characters 0.36B are left."""

# verl asks for flash-attn. Where it is not there, the package does without, but with generation off nobody does.
SDPA = ["+model.override_config.attn_implementation=sdpa"] if HAS_ENGINES else []
HARD_CODED_ATTENTION_TO_SDPA = (
    ""
    if HAS_ENGINES
    else """
from transformers import PreTrainedModel
attention_of = PreTrainedModel.get_correct_attn_implementation
PreTrainedModel.get_correct_attn_implementation = lambda self, _, *args, **kwargs: attention_of(
    self, "sdpa", *args, **kwargs
)
"""
)

_FIGURES = {
    "peak_bytes_per_parameter": "peak memory of a round above the level before it, bytes per parameter",
    "round_with_ray": "a round's peak memory above the level after it, and its time, with Ray's workers and without",
}
"""What tests measure and pytest shows at the end, with its title."""

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    for figure, title in _FIGURES.items():
        found = {r.nodeid: value for r in reports for name, value in r.user_properties if name == figure}
        if found:
            terminalreporter.section(title)
            for nodeid, value in sorted(found.items()):
                terminalreporter.line(f"{nodeid}: {value}")


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Assets:
    """A model of real size with random weights, and questions, made once however many workers there are."""
    return make_assets(tmp_path_factory, "gpu_assets")


def make_assets(tmp_path_factory: pytest.TempPathFactory, name: str, **other_shape: int) -> Assets:
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            unfinished = directory.with_suffix(".unfinished")
            write_qwen2(unfinished / "model", **other_shape)
            for multiturn in (False, True):
                kind = "multiturn" if multiturn else "singleturn"
                small.write_questions(unfinished / kind, num_train=40, num_val=32, multiturn=multiturn)
            unfinished.rename(directory)
    return Assets(directory)


def write_qwen2(directory: Path, **other_shape: int) -> None:
    small.write_model(directory)  # for its tokenizer
    tokenizer = AutoTokenizer.from_pretrained(directory)
    token_ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            Qwen2Config(vocab_size=len(tokenizer), **(SHAPE | other_shape), **token_ids)
        )
    model.generation_config = GenerationConfig(**token_ids)
    model.save_pretrained(directory)


@pytest.fixture(scope="session")
def untrained(assets) -> PreTrainedModel:
    """The model that every run starts from, in bfloat16."""
    return AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.bfloat16).to("cuda").eval()
