"""One tour of what the package does, on verl's real trainer: what is configured, and the runs.

The run of `finished` uses nearly everything at once: two ranks, FSDP2, LoRA, five trackers or six, strategies, two
answers to each sampled prompt, metrics of which one raises, prompts of one's own, a round before training, a best
value. The tour adds the same training without generation, and both once more from the checkpoint in the middle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from end_to_end.server import TrainerServer
from end_to_end.trainer import GENERATION_CONFIG, HAS_ENGINES, TRAINER_NAME, Assets, Run, strategy
from same_training import SEED_AND_REPORT

METRICS = """
def shorter(sample):
    return float(sample.num_new_tokens < 9)

def reward(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source in ("capitals", "additions")
    return {"score": float(solution_str == ground_truth), "chars": len(solution_str)}

def broken(sample):
    raise RuntimeError("planted")
"""
SPECS = [
    *("exact_match", "token_f1", "rouge_l", "bleu", "chrf", "math"),
    *("own.py:shorter", "own.py:reward", "own.py:broken"),
]
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "nucleus": {"top_p": 0.95, "top_k": 0},
    "min_p": {"min_p": 0.1, "top_p": 1.0},
    "typical": {"typical_p": 0.9},
    "beam": {"do_sample": False, "num_beams": 2},
    "likeliest": {"best_of": 3},
    "stop": {"do_sample": False, "stop_strings": ["a"]},
    "penalty": {"do_sample": False, "repetition_penalty": 1.5},
    "words": {"do_sample": False, "bad_words_ids": [[5], [6]]},
}
SAMPLED = ("nucleus", "min_p", "typical", "likeliest")
NUM_PROMPTS = 5
"""Three rows, and two prompts of one's own."""
NUM_SAMPLES = NUM_PROMPTS * sum(2 if name in SAMPLED else 1 for name in STRATEGIES)
STEPS, STOPPED_AT = 4, 2
ROUNDS = (0, 2, 4)
# verl 0.6 cannot log to trackio: `Tracking.log` names an argument that `trackio.log` does not have.
TRACKERS = f",wandb,swanlab,mlflow,tensorboard,file{',trackio' if HAS_ENGINES else ''}"
TRACKER_FILES = ("wandb", "swanlog", "mlruns", "mlflow.db", "tensorboard_log", "trackio", "project")
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "bias": "none", "task_type": "CAUSAL_LM"}

# Imported by verl inside the trainer's process (`model.external_lib`): reports at its end.
OBSERVER = f"""
import atexit, json, os, sys
trainer = [cls.__name__ for cls in sys.modules["__main__"].{TRAINER_NAME}.__mro__]

def report():
    loaded = sorted(name for name in sys.modules if name.startswith("verl_valgen"))
    json.dump(dict(trainer=trainer, loaded=loaded), open(f"observed_{{os.environ.get('RANK', 0)}}.json", "w"))

atexit.register(report)
"""


@dataclass(frozen=True)
class Tour:
    """The runs with generation and without, whole and from the middle on."""

    on: Run
    off: Run
    on_resumed: Run
    off_resumed: Run


def write_inputs(directory: Path, assets: Assets) -> None:
    """Metrics, prompts of one's own, an observer, and validation rows with parameters, of which one is wrong."""
    directory.mkdir(exist_ok=True)
    (directory / "observer.py").write_text(OBSERVER)
    (directory / "own.py").write_text(METRICS)
    (directory / "own.jsonl").write_text('"Name the capital of France."\n{"prompt": "1+1?", "reference": "2"}\n')
    frame = pd.read_parquet(assets.directory / ("multiturn" if HAS_ENGINES else "singleturn") / "val.parquet")
    short, wrong = '{"max_new_tokens": 3}', '{"max_new_tokens": "many"}'
    frame["generation_params"] = [None, short, wrong, None, short, *[None] * (len(frame) - 5)]
    frame.to_parquet(directory / "val.parquet")


def training(assets: Assets, fsdp: str) -> list[str]:
    return [
        *assets.overrides(), strategy(fsdp), "data.val_files=val.parquet", "model.external_lib=observer",
        f"trainer.total_training_steps={STEPS}", "trainer.test_freq=2", f"trainer.save_freq={STOPPED_AT}",
        "trainer.resume_mode=auto",
    ]  # fmt: skip


def generation() -> list[str]:
    return [
        f"generation.strategies={json.dumps(STRATEGIES).replace(chr(34), '')}",
        f"generation.metrics=[{','.join(SPECS)}]",
        *("generation.n=2", "generation.max_new_tokens=10", "generation.before_train=true"),
        *("generation.prompts=own.jsonl", "generation.prompts_mode=append", "trainer.max_val_samples=3"),
        *("generation.best_metric=nucleus/num_new_tokens", "generation.best_mode=min"),
        "generation.page_to_trackers=true",
    ]


def train(
    server: TrainerServer, directory: Path, arguments: Sequence[str], trackers: str, num_ranks: int | None
) -> Run:
    """A run that is seeded before it starts, with verl's trackers beside the console."""
    return server.run(
        directory,
        [*arguments, f"trainer.logger=[console{trackers}]"],
        environment={
            "WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
            "TRACKIO_DIR": f"{directory}/trackio",
        },
        num_ranks=num_ranks,
        before=SEED_AND_REPORT,
    )  # fmt: skip


def resume(server: TrainerServer, first: Run, arguments: Sequence[str], num_ranks: int) -> Run:
    """The run again, as if it had been stopped at its first checkpoint; without trackers."""
    directory = first.directory.with_name(f"{first.directory.name}-resumed")
    inputs = shutil.ignore_patterns("checkpoints", "*.pt", *TRACKER_FILES, "hydra")
    shutil.copytree(first.directory, directory, ignore=inputs)
    for name in (f"global_step_{STOPPED_AT}", "generations"):
        if (first.checkpoints / name).exists():
            shutil.copytree(first.checkpoints / name, directory / "checkpoints" / name)
    (directory / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(STOPPED_AT))
    return train(server, directory, arguments, "", num_ranks)


def make_tour(server: TrainerServer, directory: Path, assets: Assets) -> Tour:
    """The tour's four runs, on two ranks; `directory` is there, and holds one folder for each."""
    runs = {}
    for name, arguments in (
        ("on", [*GENERATION_CONFIG, *training(assets, "fsdp2"), *generation()]),
        ("off", training(assets, "fsdp2")),
    ):
        arguments = [*arguments, "model.lora_rank=4", "model.lora_alpha=16"]
        write_inputs(directory / name, assets)
        runs[name] = train(server, directory / name, arguments, TRACKERS, 2)
        assert runs[name].returncode == 0, runs[name].output[-5000:]
        runs[f"{name}_resumed"] = resume(server, runs[name], arguments, 2)
        assert runs[f"{name}_resumed"].returncode == 0, runs[f"{name}_resumed"].output[-5000:]
    return Tour(**runs)
