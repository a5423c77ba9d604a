"""The main job, on verl's real trainer: FSDP1 and FSDP2, one and two ranks, LoRA or not.

The other dimensions (environment or config, single-turn or multi-turn data, trackers, greedy or sampling, how verl
packs a batch, what it keeps in host memory) are spread over the eight runs of each trainer. Two of them are processes
of their own from the start, as a user's are, with torchrun and without; the others are forks.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from checkpoints import plain_greedy, plain_model
from end_to_end.server import TrainerServer
from end_to_end.trainer import (
    GENERATION_CONFIG,
    HAS_ENGINES,
    VERL_MODULE,
    VERL_VERSION,
    Assets,
    Run,
    run,
    shown_lines,
    strategy,
)
from packaging.version import Version
from readback import read_mlflow, read_swanlab, read_wandb
from transformers import AutoTokenizer, GenerationConfig

from verl_valgen.backends.hf import HFBackend
from verl_valgen.prompts.tokens import Decoder
from verl_valgen.records import Request

NUM_SAMPLES = 5
MAX_NEW_TOKENS = 12
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "bias": "none", "task_type": "CAUSAL_LM"}
STEPS = (2, 3)
SAMPLING = {"temperature": 1.5, "top_k": 20, "top_p": 0.9}
# verl 0.5 dies with MLflow at the first training step: it logs `train/lr(1e-3)`, a name that MLflow refuses.
MLFLOW = ("mlflow",) if Version("0.6") <= VERL_VERSION else ()


@dataclass(frozen=True)
class Case:
    strategy: str
    num_ranks: int
    lora: bool
    through: str
    trackers: tuple[str, ...]
    multiturn: bool = True
    do_sample: bool = False
    by_file: bool = False
    """Started as `.../verl/trainer/<name>.py` instead of `-m verl.trainer.<name>`."""
    is_forked: bool = True
    is_slow: bool = True
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [self.strategy, f"{self.num_ranks}-ranks", "lora" if self.lora else "full", self.through]
        parts += [] if HAS_ENGINES else ["multi" if self.multiturn else "single"]
        return "-".join([*parts, *self.trackers, *(override.rsplit(".")[-1] for override in self.overrides)])


FSDP_SFT_CASES = [
    Case("fsdp2", 1, False, "environment", ("wandb",), multiturn=False, is_forked=False, is_slow=False),
    Case("fsdp2", 1, True, "config", ("swanlab",)),
    Case("fsdp2", 2, False, "config", MLFLOW, multiturn=False, overrides=("use_remove_padding=true",)),
    Case("fsdp2", 2, True, "environment", ("wandb",), do_sample=True, is_forked=False, is_slow=False),
    Case("fsdp", 1, False, "config", MLFLOW, do_sample=True, is_slow=False),
    Case("fsdp", 1, True, "environment", ("swanlab",), multiturn=False),
    Case("fsdp", 2, False, "environment", ("swanlab",), by_file=True),
    Case("fsdp", 2, True, "config", ("wandb", *MLFLOW), multiturn=False),
]
# What differs from verl's defaults, and gradient checkpointing, which `Assets.overrides` switches off.
PADDED, FIXED = "model.use_remove_padding=false", "data.use_dynamic_bsz=false"
CHECKPOINTING = "model.enable_gradient_checkpointing=true"
OFFLOAD = ("engine.param_offload=true", "engine.optimizer_offload=true")
ENGINE_CASES = [
    Case("fsdp2", 1, False, "environment", ("wandb",), overrides=(PADDED,), is_forked=False, is_slow=False),
    Case("fsdp2", 1, True, "config", ("swanlab",), overrides=("engine.offload_policy=true",)),
    Case("fsdp2", 2, False, "config", MLFLOW, overrides=OFFLOAD),
    Case(
        *("fsdp2", 2, True, "environment", ("wandb",)),
        do_sample=True,
        overrides=(CHECKPOINTING, FIXED),
        is_forked=False,
        is_slow=False,
    ),
    Case(
        *("fsdp", 1, False, "config", MLFLOW),
        do_sample=True,
        overrides=(CHECKPOINTING, "engine.full_determinism=true"),
        is_slow=False,
    ),
    Case("fsdp", 1, True, "environment", ("swanlab",), overrides=OFFLOAD),
    Case("fsdp", 2, False, "environment", ("swanlab",), by_file=True, overrides=(FIXED,)),
    Case("fsdp", 2, True, "config", ("wandb", *MLFLOW), overrides=(PADDED, FIXED)),
]
CASES = [
    pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.is_slow else [])
    for case in (ENGINE_CASES if HAS_ENGINES else FSDP_SFT_CASES)
]


def run_case(server: TrainerServer, directory: Path, case: Case, assets: Assets) -> Run:
    values = {"do_sample": str(case.do_sample).lower(), "max_new_tokens": MAX_NEW_TOKENS} | SAMPLING
    environment = {
        "WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
    }  # fmt: skip
    arguments = assets.overrides(multiturn=case.multiturn)
    if case.through == "environment":
        environment |= {f"VERL_GENERATION_{name.upper()}": str(value) for name, value in values.items()}
        environment["VERL_MAX_VAL_SAMPLES"] = str(NUM_SAMPLES)
    else:
        arguments = [*GENERATION_CONFIG, *arguments]
        arguments += [f"generation.{name}={value}" for name, value in values.items()]
        arguments += [f"trainer.max_val_samples={NUM_SAMPLES}"]
    if case.lora:
        arguments += ["model.lora_rank=4", "model.lora_alpha=16"]
    arguments += [strategy(case.strategy), f"trainer.logger=[{','.join(('console', *case.trackers))}]"]
    arguments += case.overrides
    return (server.run if case.is_forked else run)(
        directory,
        arguments,
        environment=environment,
        num_ranks=None if case.num_ranks == 1 else case.num_ranks,
        program=Path(importlib.util.find_spec(VERL_MODULE).origin) if case.by_file else None,
    )


@pytest.fixture(scope="module", params=CASES)
def finished(request, server, tmp_path_factory, assets) -> tuple[Case, Run, Assets]:
    result = run_case(server, tmp_path_factory.mktemp("run"), request.param, assets)
    assert result.returncode == 0, result.output[-5000:]
    return request.param, result, assets


def expected_prompts(case: Case, assets: Assets) -> list[dict[str, Any]]:
    """What each sample must show, from the rows themselves; rank 0 of two has every second row."""
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    frame = pd.read_parquet(assets.directory / ("multiturn" if case.multiturn else "singleturn") / "val.parquet")
    expected = []
    for row in range(0, NUM_SAMPLES * case.num_ranks, case.num_ranks):
        if case.multiturn:
            messages = list(frame["messages"].iloc[row])
            assert messages[-1]["role"] == "assistant"
            before, reference = messages[:-1], messages[-1]["content"]
        else:
            before = [{"role": "user", "content": frame["question"].iloc[row]}]
            reference = frame["answer"].iloc[row]
        expected.append(
            {
                "row": row,
                "prompt": tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True),
                "prompt_text": before[-1]["content"],
                "reference": reference,
            }
        )
    return expected


def test_samples_come_at_every_validation_and_hold_the_right_prompts(finished):
    case, result, assets = finished
    assert sorted(path.name for path in result.generations.glob("*.jsonl")) == [f"step_{s:08d}.jsonl" for s in STEPS]
    expected = expected_prompts(case, assets)
    for step in STEPS:
        samples = result.samples(step)
        assert [{key: sample[key] for key in expected[0]} for sample in samples] == expected
        for index, sample in enumerate(samples):
            assert (sample["step"], sample["index"], sample["strategy"]) == (step, index, "default")
            assert (sample["completion"], sample["seed"], sample["scores"]) == (0, 0, {})
            params = {"do_sample": case.do_sample, "max_new_tokens": MAX_NEW_TOKENS, "dtype": "float32"}
            assert sample["params"] == params | (SAMPLING if case.do_sample else {})
            assert sample["finish_reason"] in ("eos", "length")


def test_generations_are_those_of_a_plain_model(finished):
    """The last round and the checkpoint hold the same weights."""
    case, result, assets = finished
    model = plain_model(result.checkpoints / "global_step_3", assets.model, LORA if case.lora else None)
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    samples = result.samples(3)
    prompts = [tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"] for sample in samples]
    if case.do_sample:
        # One prompt at a time, unlike the run.
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id, pad_token_id=0)
        params = {"do_sample": True, "max_new_tokens": MAX_NEW_TOKENS} | SAMPLING
        backend = HFBackend(model, tokenizer, seed=0)
        outputs = [
            backend.generate([Request(ids, (sample["row"], 0), params)])[0].output_ids
            for ids, sample in zip(prompts, samples, strict=True)
        ]
    else:
        outputs = [plain_greedy(model, ids, MAX_NEW_TOKENS) for ids in prompts]
    for sample, prompt_ids, output_ids in zip(samples, prompts, outputs, strict=True):
        assert sample["generation"] == Decoder(tokenizer).answer(output_ids)
        assert sample["num_prompt_tokens"] == len(prompt_ids)
        assert sample["num_new_tokens"] == len(output_ids)
        assert (sample["finish_reason"] == "eos") == (output_ids[-1] == tokenizer.eos_token_id)


def test_training_moved_the_weights(finished):
    """Else the rounds would show nothing, and the comparison with the checkpoint little."""
    case, result, assets = finished
    before = plain_model(result.checkpoints / "global_step_3", assets.model, LORA if case.lora else None).state_dict()
    after = torch.cat([tensor.flatten() for tensor in before.values()])
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32).state_dict()
    assert (after - torch.cat([start[name].flatten() for name in before])).abs().max() > 1e-3


def test_the_console_shows_the_block(finished):
    _, result, _ = finished
    for step in STEPS:
        lines = [f"=== Validation Samples (Step {step}) ==="]
        for sample in result.samples(step):
            lines += shown_lines([sample])
        assert "\n".join(lines) + "\n" in result.stdout


def test_one_line_at_start_says_when(finished):
    _, result, _ = finished
    assert len(re.findall(r"5 samples at steps 2 and 3, in checkpoints/generations", result.output)) == 1
    assert len(re.findall(r"neither CUDA nor NPU here: verl runs on CPU with gloo", result.output)) == 1
    assert "WARNING" not in "".join(line for line in result.output.splitlines() if "verl_valgen" in line)


def expected_texts(result: Run, step: int) -> dict[str, str]:
    texts = {}
    for number, sample in enumerate(result.samples(step), start=1):
        texts[f"val/sample_{number}_prompt"] = sample["prompt_text"]
        texts[f"val/sample_{number}_generation"] = sample["generation"]
    return texts


def expected_rows(result: Run, step: int) -> list[list[Any]]:
    keys = [
        "prompt_text", "generation", "reference", "strategy", "completion", "finish_reason", "num_new_tokens",
        "row", "data_source", "step", "index", "prompt",
    ]  # fmt: skip
    return [[sample[key] for key in keys] for sample in result.samples(step)]


def test_trackers_hold_the_samples_on_the_run_that_verl_opened(finished):
    case, result, _ = finished
    if "wandb" in case.trackers:
        (run_directory,) = (result.directory / "wandb").glob("offline-run-*")
        history = read_wandb(run_directory)
        for step in STEPS:
            assert {key: history[step][key] for key in expected_texts(result, step)} == expected_texts(result, step)
            assert history[step]["val/samples"]["data"] == expected_rows(result, step)
            assert "val/loss" in history[step]  # verl's own value at that step is there too
    if "swanlab" in case.trackers:
        (run_directory,) = (path for path in (result.directory / "swanlog").glob("*run-*") if path.is_dir())
        history = read_swanlab(run_directory)
        for step in STEPS:
            assert {key: history[step][key] for key in expected_texts(result, step)} == expected_texts(result, step)
            assert "val/samples" in history[step]
    if "mlflow" in case.trackers:
        logged = read_mlflow(*only_mlflow_run(result))
        assert sorted(logged["tables"]) == list(STEPS)
        assert {key: logged["tags"][key] for key in expected_texts(result, 3)} == expected_texts(result, 3)
        assert logged["latest"]["data"] == expected_rows(result, 3)
        assert sorted(logged["metrics"]["val/loss"]) == list(STEPS)


def only_mlflow_run(result: Run) -> tuple[str, str]:
    """URI and id of the one run that verl opened."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{result.directory}/mlflow.db"
    client = MlflowClient(uri)
    (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return uri, found.info.run_id
