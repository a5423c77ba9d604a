"""What fails after the start costs a warning, and what can be foreseen is said at the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from end_to_end.trainer import HAS_ENGINES, MODEL_KEY, VAL_BATCH_SIZE, Assets, write_program

pytestmark = pytest.mark.slow

GREEDY = {"VERL_GENERATION_DO_SAMPLE": "false", "VERL_GENERATION_MAX_NEW_TOKENS": "6"}

NO_GENERATE = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from torch import nn

class MuteConfig(LlamaConfig):
    model_type = "mute"

class MuteForCausalLM(LlamaPreTrainedModel):
    config_class = MuteConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False):
        hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids)[0]
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))

AutoConfig.register("mute", MuteConfig)
AutoModelForCausalLM.register(MuteConfig, MuteForCausalLM)
"""


def test_a_model_class_without_generate(server, tmp_path, assets):
    """Registered at start-up: `verl.trainer.fsdp_sft_trainer` imports `model.external_lib` too late for AutoConfig."""
    (tmp_path / "mute.py").write_text(NO_GENERATE)
    before = "import sys; sys.path.insert(0, '.'); import mute\n"
    program = write_program(tmp_path / "program.py", "pass", before=before)
    shutil.copytree(assets.model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "mute", "architectures": ["MuteForCausalLM"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    overrides = [*assets.overrides(), f"{MODEL_KEY}=model", "trainer.save_freq=-1"]
    result = server.run(tmp_path, overrides, environment=GREEDY, program=program)
    assert "no samples: the model class MuteForCausalLM has no `generate`" in result.output
    assert "step:3 - val/loss" in result.stdout  # training goes on
    assert not result.generations.exists()


@pytest.mark.parametrize(
    ("overrides", "line", "num_files"),
    [
        (["trainer.test_freq=-1"], "at step 3 only, the last one (trainer.test_freq is -1)", 1),
        (
            ["trainer.test_freq=-1", "trainer.total_training_steps=99"],
            "at no step: trainer.test_freq is -1, and step 99 (trainer.total_training_steps) lies beyond the data's 5",
            0,
        ),
    ],
)
def test_the_line_at_start_says_when_or_why_not(server, tmp_path, assets, overrides, line, num_files):
    result = server.run(tmp_path, [*assets.overrides(), *overrides], environment=GREEDY)
    assert result.returncode == 0, result.output[-5000:]
    assert line in result.output
    assert len(list(result.generations.glob("*.jsonl"))) == num_files


def few_rows(assets: Assets, directory: Path, num_rows: int) -> str:
    frame = pd.read_parquet(assets.directory / "multiturn" / "val.parquet")
    path = directory / "few.parquet"
    frame.head(num_rows).to_parquet(path)
    return f"data.val_files={path}"


@pytest.mark.skipif(HAS_ENGINES, reason="with engines verl goes on: see test_engines.py")
def test_a_validation_set_that_yields_no_batch(server, tmp_path, assets):
    """In a program with a trainer of its own, which might bring its own data: nothing is certain before it is built."""
    overrides = [*assets.overrides(multiturn=True), few_rows(assets, tmp_path, VAL_BATCH_SIZE - 1)]
    program = write_program(tmp_path / "program.py", "pass")
    result = server.run(tmp_path, overrides, environment=GREEDY, program=program)
    assert (
        "no samples: data.val_files has 3 rows, fewer than one batch on each of 1 data-parallel ranks" in result.output
    )
    assert "stack expects a non-empty TensorList" in result.output  # verl's own failure stays verl's


def test_fewer_samples_than_asked_for(server, tmp_path, assets):
    overrides = [*assets.overrides(multiturn=True), few_rows(assets, tmp_path, 2 * VAL_BATCH_SIZE - 1)]
    result = server.run(tmp_path, overrides, environment=GREEDY | {"VERL_MAX_VAL_SAMPLES": "50"})
    assert result.returncode == 0, result.output[-5000:]
    # Of so many rows verl validates one batch.
    assert [sample["row"] for sample in result.samples(3)] == list(range(VAL_BATCH_SIZE))


def test_answers_that_were_truncated_away_are_skipped(server, tmp_path, assets):
    frame = pd.read_parquet(assets.directory / "multiturn" / "val.parquet")
    question, answer = "x" * 300, frame.loc[1, "answer"]
    frame.loc[1, "question"] = question  # read as single turns, or as conversations
    frame.at[1, "messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    frame.to_parquet(tmp_path / "long.parquet")
    overrides = [*assets.overrides(), f"data.val_files={tmp_path}/long.parquet", "data.truncation=right"]
    result = server.run(tmp_path, overrides, environment=GREEDY)
    assert result.returncode == 0, result.output[-5000:]
    assert result.output.count("rows [1] of the validation data have no answer left within data.max_length") == 1
    assert [sample["row"] for sample in result.samples(2)] == [0, 2, 3, 4]


def test_a_failing_generation_and_a_failing_tracker_cost_one_warning_each(server, tmp_path, assets):
    """Parameters that transformers refuses only while it generates; a folder that cannot be written."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "generations").write_text("in the way")
    result = server.run(tmp_path, [*assets.overrides(), "trainer.test_freq=1"], environment=GREEDY)
    assert result.returncode == 0, result.output[-5000:]
    assert result.output.count("jsonl: a round was not recorded: ") == 1
    assert result.stdout.count("=== Validation Samples") == 3  # the console goes on

    overrides = [*assets.overrides(), "trainer.test_freq=1", "+generation.exponential_decay_length_penalty=[1]"]
    result = server.run(tmp_path / "generation", overrides, environment=GREEDY)
    assert result.returncode == 0, result.output[-5000:]
    assert result.output.count("no samples at this validation: ") == 1
    assert len(result.logged("val/loss")) == 3


def test_a_token_that_the_model_has_not_is_told_at_the_start(server, tmp_path, assets):
    result = server.run(tmp_path, [*assets.overrides(), "+generation.bad_words_ids=[[999999]]"], environment=GREEDY)
    assert result.returncode == 2, result.output[-5000:]
    line = "verl-valgen: generation.bad_words_ids must have ids of tokens, below 100, got 999999"
    assert result.output.count(line) == 1
    assert result.logged("train/loss") == []
    assert not result.generations.exists()


def test_debug_shows_what_is_gathered(server, tmp_path, assets):
    environment = GREEDY | {"VERL_SFT_LOGGING_LEVEL": "DEBUG"}
    result = server.run(tmp_path, assets.overrides(), environment=environment)
    assert result.returncode == 0, result.output[-5000:]
    assert result.output.count("MB on 1 rank(s) into a torch.float32 copy of LlamaForCausalLM") == 2
    assert result.output.count("tokens for 5 prompts in ") == 2
