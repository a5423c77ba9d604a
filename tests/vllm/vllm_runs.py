"""Runs of verl's trainer with `generation.backend=vllm` that the tests share, each beside the same training without.

The model has heads that vLLM's attention on CPU takes, and attends to its prompts, so that answers differ. Its
positions end where the longest answers do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import assets as small
import torch
from end_to_end.server import TrainerServer
from end_to_end.trainer import GENERATION_CONFIG, Assets, Run, strategy
from same_training import SEED_AND_REPORT
from transformers import AutoModelForCausalLM

STEPS, STOPPED_AT = 4, 2
ROUNDS = (0, 2, 4)
NUM_ROWS = 3
OWN_PROMPTS = ("Name the capital of France.", "1+1?")
MAX_NEW_TOKENS = 12
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "bias": "none", "task_type": "CAUSAL_LM"}
WITH_LORA = ("model.lora_rank=4", "model.lora_alpha=16", "optim.lr=4e-3")
VLLM = "generation.backend=vllm"
GREEDY = "generation.do_sample=false"
STOP_STRINGS = [*"aeinorstAEINORST", "xyz"]
"""Many, so that some of them come."""
BAD_WORDS = [*([i] for i in range(20, 60)), [5, 6]]
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "nucleus": {"top_p": 0.95, "top_k": 0},
    "likeliest": {"best_of": 3},
    "stop": {"do_sample": False, "stop_strings": STOP_STRINGS},
    "penalty": {"do_sample": False, "repetition_penalty": 1.5},
    "words": {"do_sample": False, "bad_words_ids": BAD_WORDS},
}
SAMPLED = ("nucleus", "likeliest")

OBSERVER = """
import atexit, json, os, sys

def report():
    names = sorted(name for name in sys.modules if name.partition(".")[0] == "vllm")
    json.dump(names, open(f"loaded_{os.environ.get('RANK', 0)}.json", "w"))

atexit.register(report)
"""
"""Tells what of vLLM is loaded at the end. verl imports it in the trainer's process."""

ENGINE = "vllm.v1.engine.llm_engine"
"""verl imports parts of vLLM itself wherever that is installed, but not this one."""


@dataclass(frozen=True)
class Case:
    """A way to train, and what is answered."""

    num_ranks: int | None
    fsdp: str
    overrides: Sequence[str]
    generation: Sequence[str]


WITH_STRATEGIES = "two ranks hold a model"
CASES = {
    WITH_STRATEGIES: Case(
        2,
        "fsdp2",
        (),
        (
            "generation.tensor_parallel=2",
            f"generation.strategies={json.dumps(STRATEGIES).replace(chr(34), '')}",
            *("generation.n=2", "generation.prompts=own.jsonl", "generation.prompts_mode=append"),
        ),
    ),
    "each of two ranks holds one": Case(
        2, "fsdp", WITH_LORA, ("generation.tensor_parallel=1", "generation.ranks=2", GREEDY)
    ),
    "one rank, with adapters": Case(None, "fsdp2", WITH_LORA, (GREEDY,)),
}


@dataclass(frozen=True)
class Pair:
    case: Case
    on: Run
    off: Run


def write_assets(directory: Path) -> Assets:
    small.write_model(
        directory / "model", hidden_size=64, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64
    )
    small.write_questions(directory / "multiturn", num_train=40, num_val=20, multiturn=True)
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8 if "self_attn" in name else 1)
    model.save_pretrained(directory / "model")
    return Assets(directory)


def train(
    server: TrainerServer,
    directory: Path,
    assets: Assets,
    case: Case,
    *generation: str,
    before: str = "",
) -> Run:
    """One run; without `generation`, with it off.

    Args:
        before: Runs in each rank before the trainer's program.
    """
    directory.mkdir(parents=True)
    (directory / "observer.py").write_text(OBSERVER)
    (directory / "own.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in OWN_PROMPTS))
    shared = (f"generation.max_new_tokens={MAX_NEW_TOKENS}", f"trainer.max_val_samples={NUM_ROWS}")
    result = server.run(
        directory,
        [
            *([*GENERATION_CONFIG, *shared, *generation] if generation else []),
            *assets.overrides(), strategy(case.fsdp), "model.external_lib=observer", "optim.lr=3e-4",
            f"trainer.total_training_steps={STEPS}", "trainer.test_freq=2", f"trainer.save_freq={STOPPED_AT}",
            *case.overrides,
        ],
        num_ranks=case.num_ranks,
        before=SEED_AND_REPORT + before,
    )  # fmt: skip
    assert result.returncode == 0, result.output[-5000:]
    return result


def loaded(run: Run) -> list[list[str]]:
    """vLLM's modules that each rank has loaded."""
    return [json.loads(path.read_text()) for path in sorted(run.directory.glob("loaded_*.json"))]


def make_pair(server: TrainerServer, directory: Path, assets: Assets, name: str) -> Pair:
    case = CASES[name]
    on = train(server, directory / "on", assets, case, VLLM, "generation.before_train=true", *case.generation)
    return Pair(case, on, train(server, directory / "off", assets, case))


def remove(pair: Pair) -> None:
    shutil.rmtree(pair.on.directory.parent)
