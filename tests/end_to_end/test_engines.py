"""What only `verl.trainer.sft_trainer` has: engines, nested batches, fused kernels, Ulysses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import assets as small
import pandas as pd
import pytest
import torch
from checkpoints import assert_greedy_samples, plain_greedy, plain_model
from end_to_end.server import TrainerServer
from end_to_end.trainer import HAS_ENGINES, VAL_BATCH_SIZE, Assets, Run, strategy, write_program
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from verl_valgen.prompts.tokens import Decoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_ENGINES, reason="verl.trainer.fsdp_sft_trainer has no engines"),
]

MAX_NEW_TOKENS = 8
GREEDY = {"VERL_GENERATION_DO_SAMPLE": "false", "VERL_GENERATION_MAX_NEW_TOKENS": str(MAX_NEW_TOKENS)}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "bias": "none", "task_type": "CAUSAL_LM"}


# A model with tied embeddings and random weights repeats its last token: the same for all prompts, which shows little.
VARIED = {"no_repeat_ngram_size": 1}
WITH_VARIETY = "+generation.no_repeat_ngram_size=1"


def assert_samples_of_the_checkpoint(result: Run, model: Path, *, rows: list[int], **parameters: Any) -> None:
    """The last round is what the plain model says whose weights are in the last checkpoint."""
    assert result.returncode == 0, result.output[-5000:]
    samples = result.samples(3)
    assert [sample["row"] for sample in samples] == rows
    assert all(sample["verified"] is True for sample in samples)
    plain = plain_model(result.checkpoints / "global_step_3", model)
    assert_greedy_samples(samples, plain, AutoTokenizer.from_pretrained(model), MAX_NEW_TOKENS, **parameters)


@pytest.mark.parametrize(("fsdp", "tied"), [("fsdp", False), ("fsdp2", True)])
def test_fused_kernels_replace_the_forward_of_the_trained_model_alone(server, tmp_path, assets, fsdp, tied):
    """By one without logits, in the model's class. (With FSDP2 verl 0.9.1 trains so only where embeddings are tied:
    else `lm_head` is sharded by itself, and the fused forward does not gather it.)"""
    model = tmp_path / "model"
    small.write_model(model, hidden_size=32, intermediate_size=64, tie_word_embeddings=tied)
    overrides = [
        *assets.overrides(),
        f"model.path={model}",
        strategy(fsdp),
        "model.use_fused_kernels=true",
        WITH_VARIETY,
    ]
    result = server.run(tmp_path, overrides, environment=GREEDY)
    assert_samples_of_the_checkpoint(result, model, rows=[0, 1, 2, 3, 4], **VARIED)


WRONG_WEIGHTS = """
def fit(self):
    from verl_valgen.weights.plain_copy import PlainCopy

    finish = PlainCopy.finish

    def finish_with_a_wrong_norm(copy):
        model = finish(copy)
        model.model.norm.weight.data.mul_(30)
        return model

    PlainCopy.finish = finish_with_a_wrong_norm
    super().fit()
"""


def test_where_the_model_gives_no_logits_verls_own_forward_finds_wrong_weights(server, tmp_path, assets):
    """The copy itself finds nothing amiss: it is asked about its own answers."""
    program = write_program(tmp_path / "program.py", WRONG_WEIGHTS)
    overrides = [*assets.overrides(), strategy("fsdp"), "model.use_fused_kernels=true", "trainer.test_freq=3"]
    result = server.run(tmp_path, overrides, environment=GREEDY, program=program)
    assert result.returncode == 0, result.output[-5000:]
    assert [sample["verified"] for sample in result.samples(3)] == [False] * 5
    assert "the copy gives an answer a mean log-probability of" in result.output
    assert result.stdout.count("(withheld: failed the check against the trainer's model)") == 5


FREED = """
def fit(self):
    import gc, json, weakref

    host, copies = self._rounds.host, []
    gather = host.gather

    def watched_gather(dtype, *, keep):
        copy = gather(dtype, keep=keep)
        copies.append(weakref.ref(copy))
        return copy

    host.gather = watched_gather
    gc.disable()
    super().fit()
    json.dump([copy() is None for copy in copies], open("freed.json", "w"))
"""


def test_the_copy_is_gone_after_a_round_without_a_garbage_collection(server, tmp_path, assets):
    """With fused kernels, where it has a `forward` of its own."""
    program = write_program(tmp_path / "program.py", FREED)
    overrides = [*assets.overrides(), strategy("fsdp"), "model.use_fused_kernels=true"]
    result = server.run(tmp_path, overrides, environment=GREEDY, program=program)
    assert result.returncode == 0, result.output[-5000:]
    assert json.loads((tmp_path / "freed.json").read_text()) == [True, True]


def test_with_ulysses_both_ranks_have_the_same_rows(server, tmp_path, assets):
    overrides = [*assets.overrides(), "engine.ulysses_sequence_parallel_size=2"]
    result = server.run(tmp_path, overrides, environment=GREEDY, num_ranks=2)
    assert_samples_of_the_checkpoint(result, assets.model, rows=[0, 1, 2, 3, 4])
    assert result.stdout.count("=== Validation Samples") == 2  # one rank shows them


def test_padded_batches_are_refused_by_verl_itself(server, tmp_path, assets):
    result = server.run(tmp_path, [*assets.overrides(), "data.pad_mode=right"], environment=GREEDY)
    assert result.returncode != 0
    assert "5 samples at steps 2 and 3" in result.output
    assert "AssertionError: pad_mode right not supported" in result.stderr


PADDED_AND_NESTED = """
def fit(self):
    import json
    from verl.utils.dataset.dataset_utils import SFTTensorCollator

    padded = next(iter(self.val_dataloader))
    assert not padded["input_ids"].is_nested
    self.val_dataset.pad_mode = "no_padding"
    nested = SFTTensorCollator("no_padding")([self.val_dataset[row] for row in range(len(padded["input_ids"]))])
    assert nested["input_ids"].is_nested
    json.dump([self.generate_samples(batch) for batch in (padded, nested)], open("answers.json", "w"))
"""


def test_padded_batches_are_answered_like_nested_ones(server, tmp_path, assets):
    program = write_program(tmp_path / "program.py", PADDED_AND_NESTED)
    result = server.run(tmp_path, [*assets.overrides(), "data.pad_mode=right"], environment=GREEDY, program=program)
    assert result.returncode == 0, result.output[-5000:]
    padded, nested = json.loads((tmp_path / "answers.json").read_text())
    assert padded == nested
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    model = AutoModelForCausalLM.from_pretrained(assets.model).eval()
    prompts, generations = padded
    assert len(prompts) == VAL_BATCH_SIZE
    for prompt, generation in zip(prompts, generations, strict=True):
        output_ids = plain_greedy(model, tokenizer(prompt, add_special_tokens=False)["input_ids"], MAX_NEW_TOKENS)
        assert generation == Decoder(tokenizer).answer(output_ids)


def test_without_validation_data_the_cause_is_named(server, tmp_path, assets):
    overrides = [*assets.overrides(), "data.val_files=null", "trainer.test_freq=-1"]
    result = server.run(tmp_path, overrides, environment=GREEDY)
    assert result.output.count("no samples: data.val_files is not set") == 1
    assert not result.generations.exists()
    assert result.returncode == 0, result.output[-5000:]
    assert len(result.logged("train/loss")) == 3


def test_where_a_trainer_of_ones_own_may_bring_data_verls_failure_stays_verls(server, tmp_path, assets):
    overrides = [*assets.overrides(), "data.val_files=null", "trainer.test_freq=2"]
    program = write_program(tmp_path / "program.py", "pass")
    result = server.run(tmp_path, overrides, environment=GREEDY, program=program)
    assert result.returncode != 0
    assert "so verl will fail where it validates (trainer.test_freq=2)" in result.output
    assert "'NoneType' object is not iterable" in result.output
    assert not result.generations.exists()


def test_a_validation_set_smaller_than_a_batch(server, tmp_path, assets):
    pd.read_parquet(assets.directory / "multiturn" / "val.parquet").head(VAL_BATCH_SIZE - 1).to_parquet(
        tmp_path / "few.parquet"
    )
    result = server.run(tmp_path, [*assets.overrides(), f"data.val_files={tmp_path}/few.parquet"], environment=GREEDY)
    assert result.returncode == 0, result.output[-5000:]
    assert (
        "no samples: data.val_files has 7 rows, fewer than one global batch (data.train_batch_size=8, 8 rows on each "
        "of 1 data-parallel ranks), and verl drops incomplete batches: its val/loss will be nan" in result.output
    )
    assert result.logged("val/loss") == ["nan", "nan"]
    assert not result.generations.exists()


def run_small_engine(
    server: TrainerServer, directory: Path, assets: Assets, overrides: list[str], *, num_ranks: int | None = None
) -> Run:
    """With an engine whose model cannot be seen, only its weights be asked for."""
    shutil.copy(Path(__file__).with_name("small_engine.py"), directory)
    overrides = [
        *assets.overrides(),
        "model.external_lib=small_engine",
        "engine._target_=small_engine.ListEngineConfig",
        "engine.strategy=list",
        *overrides,
    ]
    return server.run(directory, overrides, environment=GREEDY, num_ranks=num_ranks)


def test_an_engine_of_another_kind_exports_its_weights(server, tmp_path, assets):
    result = run_small_engine(server, tmp_path, assets, [], num_ranks=2)
    assert_samples_of_the_checkpoint(result, assets.model, rows=[0, 2, 4, 6, 8])


def write_mixture_of_experts(directory: Path, *, tie_word_embeddings: bool) -> None:
    """A Qwen3-MoE with random weights in place of the small Llama, and its tokenizer."""
    small.write_model(directory, hidden_size=32, intermediate_size=64)
    llama = AutoConfig.from_pretrained(directory)
    sizes = {name: getattr(llama, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {name: getattr(llama, name) for name in ("num_hidden_layers", "num_attention_heads", "eos_token_id")}
    config = Qwen3MoeConfig(
        **sizes, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        bos_token_id=None, pad_token_id=llama.pad_token_id, max_position_embeddings=llama.max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).save_pretrained(directory)


def test_experts_exported_one_by_one_without_the_tied_weights(server, tmp_path, assets):
    model = tmp_path / "tied"
    write_mixture_of_experts(model, tie_word_embeddings=True)
    result = run_small_engine(server, tmp_path, assets, [f"model.path={model}", WITH_VARIETY])
    assert_samples_of_the_checkpoint(result, model, rows=[0, 1, 2, 3, 4], **VARIED)


def test_adapters_exported_apart_cost_one_warning(server, tmp_path, assets):
    result = run_small_engine(server, tmp_path, assets, ["model.lora_rank=4"], num_ranks=2)
    assert result.returncode == 0, result.output[-5000:]
    assert result.output.count("no samples at this validation: ") == 1
    assert result.output.count("set model.lora.merge=true") == 1
    assert len(result.logged("val/loss")) == 2
    assert not result.generations.exists()


def test_adapters_merged_by_the_engine(server, tmp_path, assets):
    """It exports what it merges in bfloat16, every expert by itself."""
    model = tmp_path / "experts"
    write_mixture_of_experts(model, tie_word_embeddings=False)
    overrides = [f"model.path={model}", "model.lora_rank=4", "model.lora.merge=true", WITH_VARIETY]
    result = run_small_engine(server, tmp_path, assets, overrides)
    assert result.returncode == 0, result.output[-5000:]
    plain = plain_model(result.checkpoints / "global_step_3", model, LORA).bfloat16().float()
    assert_greedy_samples(result.samples(3), plain, AutoTokenizer.from_pretrained(model), MAX_NEW_TOKENS, **VARIED)
