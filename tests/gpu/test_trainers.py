"""`verl.trainer.fsdp_sft_trainer` on CUDA with NCCL, in bfloat16 mixed precision."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from checkpoints import plain_model
from end_to_end.trainer import Assets, Run, run
from gpu.near_ties import assert_greedy
from transformers import AutoTokenizer

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "bias": "none", "task_type": "CAUSAL_LM"}
GREEDY = {"VERL_GENERATION_DO_SAMPLE": "false", "VERL_GENERATION_MAX_NEW_TOKENS": "24"}

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
needs_flash_attn = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="verl's padding removal needs flash-attn"
)


def check(result: Run, assets: Assets, lora: dict | None = None) -> None:
    assert result.returncode == 0, result.output[-5000:]
    model = plain_model(result.checkpoints / "global_step_3", assets.model, lora).to("cuda", torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    samples = result.samples(3)
    assert len(samples) == 5
    for sample in samples:
        assert sample["params"]["dtype"] == "bfloat16"
        prompt_ids = tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]
        # This tokenizer has one token per character: encoding the text gives the generated ids back.
        output_ids = tokenizer(sample["generation"], add_special_tokens=False)["input_ids"]
        assert_greedy(model, prompt_ids, output_ids + [tokenizer.eos_token_id] * (sample["finish_reason"] == "eos"))


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=needs_two)])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_greedy_is_that_of_the_plain_model(tmp_path, assets, strategy, lora, num_ranks):
    overrides = [*assets.overrides(multiturn=True), f"model.strategy={strategy}", "optim.lr=1e-3"]
    if lora:
        overrides += ["model.lora_rank=8"]
    result = run(tmp_path, overrides, environment=GREEDY, num_ranks=None if num_ranks == 1 else num_ranks)
    check(result, assets, LORA if lora else None)
    assert "verl runs on CPU" not in result.output


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=needs_two)])
def test_offloaded_parameters(tmp_path, assets, num_ranks):
    overrides = [*assets.overrides(multiturn=True), "model.strategy=fsdp", "optim.lr=1e-3"]
    overrides += ["model.fsdp_config.cpu_offload=true", "model.fsdp_config.offload_params=true"]
    check(run(tmp_path, overrides, environment=GREEDY, num_ranks=None if num_ranks == 1 else num_ranks), assets)


@needs_flash_attn
@pytest.mark.parametrize("sequence_parallel_size", [1, pytest.param(2, marks=needs_two)])
def test_padding_removal_and_ulysses(tmp_path, assets, sequence_parallel_size):
    overrides = [*assets.overrides(multiturn=True), "use_remove_padding=true", "optim.lr=1e-3"]
    overrides += [f"ulysses_sequence_parallel_size={sequence_parallel_size}"]
    check(run(tmp_path, overrides, environment=GREEDY, num_ranks=sequence_parallel_size), assets)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_rounds_between_the_steps_change_no_loss(tmp_path, assets, strategy):
    overrides = [*assets.overrides(multiturn=True), f"model.strategy={strategy}"]
    sampling = {"VERL_GENERATION_MAX_NEW_TOKENS": "24"}
    often = run(tmp_path / "often", [*overrides, "trainer.test_freq=1"], environment=sampling)
    once = run(tmp_path / "once", [*overrides, "trainer.test_freq=-1"], environment=sampling)
    assert len(list(often.generations.iterdir())) == 3, often.output[-5000:]
    assert len(list(once.generations.iterdir())) == 1, once.output[-5000:]
    assert len(often.logged("train/loss")) == 3
    assert often.logged("train/loss") == once.logged("train/loss")


def test_memory_is_back_at_its_level_after_a_round(tmp_path, assets):
    program = tmp_path / "program.py"
    program.write_text(MEMORY)
    result = run(tmp_path, assets.overrides(multiturn=True), environment=GREEDY, program=[str(program)])
    assert result.returncode == 0, result.output[-5000:]
    levels = [line.split() for line in result.stdout.splitlines() if line.startswith("memory")]
    assert len(levels) == 2
    for _, before, after in levels:
        assert before == after


MEMORY = """
import hydra, torch
from verl.trainer.fsdp_sft_trainer import FSDPSFTTrainer
from verl_valgen import ValidationGenerationMixin, run_sft
from verl_valgen.rounds import ValidationRounds

run_round = ValidationRounds.run

def run(self, step):
    before = torch.cuda.memory_allocated()
    run_round(self, step)
    print("memory", before, torch.cuda.memory_allocated(), flush=True)

ValidationRounds.run = run

class MyTrainer(ValidationGenerationMixin, FSDPSFTTrainer):
    pass

@hydra.main(config_path="pkg://verl.trainer.config", config_name="sft_trainer", version_base=None)
def main(config):
    run_sft(config, MyTrainer)

main()
"""
