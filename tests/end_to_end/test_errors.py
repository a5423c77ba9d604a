"""Wrong configuration ends the run with one line; what fails later costs a warning."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from end_to_end.trainer import Assets, run

GREEDY = {"VERL_GENERATION_DO_SAMPLE": "false", "VERL_GENERATION_MAX_NEW_TOKENS": "6"}
# The unit tests try every wrong value; these show what one run makes of them.
WRONG = [
    ({"VERL_GENERATION_DO_SAMPLE": "maybe"}, [], "VERL_GENERATION_DO_SAMPLE must be a boolean"),
    ({"VERL_GENERATION_TEMPRATURE": "1.0"}, [], "did you mean VERL_GENERATION_TEMPERATURE?"),
    ({}, ["+generation.temprature=3"], "did you mean generation.temperature?"),
]


@pytest.mark.parametrize(("environment", "overrides", "message"), WRONG)
def test_wrong_configuration_is_one_line_before_the_model_is_loaded(tmp_path, assets, environment, overrides, message):
    overrides = [*assets.overrides(multiturn=False), "model.partial_pretrain=/no/such/model", *overrides]
    result = run(tmp_path, overrides, environment=environment)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("verl-valgen: ")
    assert message in line
    assert "Traceback" not in result.output


def test_on_two_ranks_it_is_said_once(tmp_path, assets):
    environment = {"VERL_GENERATION_TOP_P": "1.5"}
    result = run(tmp_path, assets.overrides(multiturn=False), environment=environment, num_ranks=2)
    assert result.returncode != 0
    assert result.stderr.count("VERL_GENERATION_TOP_P must be a number in (0, 1], got '1.5'") == 1


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


def test_a_model_class_without_generate(tmp_path, assets):
    """verl imports `model.external_lib` too late for AutoConfig, so the class is registered at start-up."""
    import json
    import shutil

    (tmp_path / "mute.py").write_text(NO_GENERATE)
    (tmp_path / "program.py").write_text(
        "import sys; sys.path.insert(0, '.'); import mute, runpy\n"
        "from verl_valgen import ValidationGenerationMixin, run_sft\n"
        "from verl.trainer import fsdp_sft_trainer as verls\n"
        "import hydra\n"
        "class Trainer(ValidationGenerationMixin, verls.FSDPSFTTrainer): pass\n"
        "@hydra.main(config_path='pkg://verl.trainer.config', config_name='sft_trainer', version_base=None)\n"
        "def main(config): run_sft(config, Trainer)\n"
        "main()\n"
    )
    shutil.copytree(assets.model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "mute", "architectures": ["MuteForCausalLM"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    overrides = [*assets.overrides(multiturn=False), "model.partial_pretrain=model", "trainer.save_freq=-1"]
    result = run(tmp_path, overrides, environment=GREEDY, program=["program.py"])
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
def test_the_line_at_start_says_when_or_why_not(tmp_path, assets, overrides, line, num_files):
    result = run(tmp_path, [*assets.overrides(multiturn=False), *overrides], environment=GREEDY)
    assert result.returncode == 0, result.output[-5000:]
    assert line in result.output
    assert len(list(result.generations.glob("*"))) == num_files


def few_rows(assets: Assets, directory: Path, num_rows: int) -> str:
    frame = pd.read_parquet(assets.directory / "multiturn" / "val.parquet")
    path = directory / "few.parquet"
    frame.head(num_rows).to_parquet(path)
    return f"data.val_files={path}"


def test_a_validation_set_that_yields_no_batch(tmp_path, assets):
    overrides = [*assets.overrides(multiturn=True), few_rows(assets, tmp_path, 3)]
    result = run(tmp_path, overrides, environment=GREEDY)
    assert (
        "no samples: data.val_files has 3 rows, fewer than one batch on each of 1 data-parallel ranks" in result.output
    )
    assert "stack expects a non-empty TensorList" in result.output  # verl's own failure stays verl's


def test_fewer_samples_than_asked_for(tmp_path, assets):
    overrides = [*assets.overrides(multiturn=True), few_rows(assets, tmp_path, 7)]
    result = run(tmp_path, overrides, environment=GREEDY | {"VERL_MAX_VAL_SAMPLES": "50"})
    assert result.returncode == 0, result.output[-5000:]
    assert [sample["row"] for sample in result.samples(3)] == [0, 1, 2, 3]  # of 7 rows verl validates one batch of 4


def test_answers_that_were_truncated_away_are_skipped(tmp_path, assets):
    frame = pd.read_parquet(assets.directory / "singleturn" / "val.parquet")
    frame.loc[1, "question"] = "x" * 300
    frame.to_parquet(tmp_path / "long.parquet")
    overrides = [*assets.overrides(multiturn=False), f"data.val_files={tmp_path}/long.parquet", "data.truncation=right"]
    result = run(tmp_path, overrides, environment=GREEDY)
    assert result.returncode == 0, result.output[-5000:]
    assert result.output.count("rows [1] of the validation data have no answer left within data.max_length") == 1
    assert [sample["row"] for sample in result.samples(2)] == [0, 2, 3, 4]


def test_a_failing_generation_and_a_failing_tracker_cost_one_warning_each(tmp_path, assets):
    """A bad word sequence that transformers refuses only while it generates; a folder that cannot be written."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "generations").write_text("in the way")
    result = run(tmp_path, [*assets.overrides(multiturn=False), "trainer.test_freq=1"], environment=GREEDY)
    assert result.returncode == 0, result.output[-5000:]
    assert result.output.count("jsonl: samples were not recorded: ") == 1
    assert result.stdout.count("=== Validation Samples") == 3  # the console goes on

    overrides = [*assets.overrides(multiturn=False), "trainer.test_freq=1", "+generation.bad_words_ids=[[999999]]"]
    result = run(tmp_path / "generation", overrides, environment=GREEDY)
    assert result.returncode == 0, result.output[-5000:]
    assert result.output.count("no samples at this validation: ") == 1
    assert len(result.logged("val/loss")) == 3


def test_debug_shows_what_is_gathered(tmp_path, assets):
    environment = GREEDY | {"VERL_SFT_LOGGING_LEVEL": "DEBUG"}
    result = run(tmp_path, assets.overrides(multiturn=False), environment=environment)
    assert result.returncode == 0, result.output[-5000:]
    assert result.output.count("MB from FSDPLlamaForCausalLM on 1 rank(s) into a torch.float32 copy") == 2
    assert result.output.count("tokens for 5 prompts in ") == 2
