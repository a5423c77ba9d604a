"""A base model in training, whose own configuration knows no end of a turn: its rounds, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import assets
import pandas as pd
import pytest
import torch.distributed as dist
from distributed.test_rounds import SmallHost, warnings_of_rounds
from distributed.testing import run_distributed
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer
from unit.prompts.templates import FAMILIES, tokenizer_of
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

from verl_valgen.rounds.rounds import ValidationRounds
from verl_valgen.settings.load import GenerationSettings

THOUGHT = "<think>\nsum\n</think>\n\n14"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base")
    assets.write_model(path / "model", hidden_size=32, intermediate_size=64)
    tokenizer = tokenizer_of(FAMILIES["Qwen3"], AutoTokenizer.from_pretrained(path / "model"))
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    model.resize_token_embeddings(len(tokenizer) + 8)  # padded, as they often are
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    messages = [[{"role": "user", "content": text}, {"role": "assistant", "content": THOUGHT}] for text in ("a?", "b?")]
    pd.DataFrame({"messages": messages, "ground_truth": ["14", "15"]}).to_parquet(path / "rows.parquet")
    return path


def two_rounds(directory: Path) -> dict[str, Any]:
    """With models that say one token alone: the end of a turn, or one that no tokenizer has."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    config = OmegaConf.create({"max_length": 200, "ignore_input_ids_mismatch": True})
    dataset = MultiTurnSFTDataset(str(directory / "rows.parquet"), tokenizer, config)
    results: dict[str, Any] = {}
    for name, token in (("end", tokenizer.convert_tokens_to_ids("<|im_end|>")), ("none", len(tokenizer) + 7)):
        host = SmallHost(directory, directory / name, dataset)
        settings = GenerationSettings(
            enabled=True, do_sample=False, max_new_tokens=3, max_val_samples=2, ranks=2, reasoning="strip",
            reference="ground_truth", extra={"sequence_bias": [[[token], 1e4]]},
        )  # fmt: skip
        with warnings_of_rounds() as warnings:
            rounds = ValidationRounds(host, settings)
            with rounds:
                host.rounds(1)
            said = rounds.generate_samples({"input_ids": dataset[0]["input_ids"][None, :5]})
        path = directory / name / "generations" / "step_00000001.jsonl"
        lines = path.read_text().splitlines() if dist.get_rank() == 0 else []
        results[name] = {"warnings": warnings, "samples": [json.loads(line) for line in lines], "said": said}
    return results


def test_answers_end_and_are_shown_as_they_are(directory):
    first, second = run_distributed(two_rounds, 2, directory, directory)
    assert [second[name]["warnings"] for name in second] == [[], []]
    ends, unknown = first["end"], first["none"]
    for sample in ends["samples"]:
        assert (sample["finish_reason"], sample["num_new_tokens"]) == ("eos", 1)
        assert (sample["generation"], sample["generation_raw"]) == ("", "<|im_end|>")
    for sample in unknown["samples"]:
        assert sample["finish_reason"] == "length"
        assert (sample["generation"], sample["generation_raw"]) == ("", "\ufffd" * 3)  # no end of reasoning
    assert [sample["reference"] for sample in ends["samples"]] == ["14", "15"]
    is_lost = ends["samples"][0]["reference_text"] is not None  # verl >= 0.7 does not train the reasoning
    assert ends["samples"][0]["reference_raw"] == ("14" if is_lost else THOUGHT) + "<|im_end|>\n"
    assert [sample["reference_text"] for sample in ends["samples"]] == [THOUGHT if is_lost else None] * 2
    lost = "validation data and training differ: the reasoning in the data is not trained (rows 0, 1)"
    assert [text.partition(";")[0] for text in ends["warnings"]] == [lost] * is_lost
    assert (ends["said"][1], unknown["said"][1]) == ([""], [""])
