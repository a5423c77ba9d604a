"""verl's own SFT trainer on CPU, on a small model and questions made on the spot; `make demo` runs it.

All that it writes lies in `demo/`. Running it again starts from the beginning; samples of earlier runs are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from assets import write_model, write_unseen_wordings

from verl_valgen.text import printable

DIRECTORY = Path(__file__).resolve().parent.parent / "demo"
GENERATIONS = "checkpoints/generations"
TRACKING_URI = "sqlite:///{}/mlflow.db"
REQUIRED_EXACT_MATCH = 0.9

NUM_STEPS = 240
BATCH_SIZE = 24

# Paths are relative to the folder that the trainer runs in: as values in Hydra's grammar, others would need quoting.
OVERRIDES = [
    "data.train_files=train.parquet",
    "data.val_files=val.parquet",
    f"data.train_batch_size={BATCH_SIZE}",
    f"data.micro_batch_size_per_gpu={BATCH_SIZE}",
    "data.max_length=64",
    "model.path=model",
    "model.enable_gradient_checkpointing=false",
    "optim.lr=4e-3",
    "optim.lr_scheduler_type=cosine",
    "trainer.total_epochs=1",
    "trainer.test_freq=30",
    "trainer.default_local_dir=checkpoints",
    "trainer.resume_mode=disable",
    "checkpoint.save_contents=[model]",
    "trainer.project_name=verl-valgen",
    "trainer.experiment_name=demo",
    "+generation.metrics=[exact_match]",
    "+generation.best_metric=exact_match",
    "trainer.logger=[mlflow]",  # verl's console logger would print a line per step through the progress bar
    "hydra.run.dir=hydra",
    "hydra.job_logging.root.level=ERROR",  # verl's MLflow logger warns twice a step that it renames its own metrics
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the model's random weights")
    args = parser.parse_args()

    prepare(args.seed)
    status = subprocess.run(
        [sys.executable, "-m", "verl.trainer.sft_trainer", *OVERRIDES], cwd=DIRECTORY, env=environment()
    ).returncode
    if status != 0:
        sys.exit(f"The trainer ended with status {status}.")
    sys.exit(0 if report() >= REQUIRED_EXACT_MATCH else "The model did not learn its answers.")


def prepare(seed: int) -> None:
    """Writes model and data, and removes the checkpoints of an earlier run."""
    for checkpoint in DIRECTORY.glob("checkpoints/global_step_*"):
        shutil.rmtree(checkpoint)
    write_model(DIRECTORY / "model", hidden_size=64, intermediate_size=256, num_key_value_heads=4, seed=seed)
    write_unseen_wordings(DIRECTORY, num_train=NUM_STEPS * BATCH_SIZE)


def environment() -> dict[str, str]:
    """This process's environment, and how to answer: with the likeliest token, as every question has one answer."""
    return os.environ | {
        "VERL_GENERATION_DO_SAMPLE": "false",
        "VERL_GENERATION_MAX_NEW_TOKENS": "20",
        "VERL_MAX_VAL_SAMPLES": "12",
        "MLFLOW_TRACKING_URI": TRACKING_URI.format(DIRECTORY),
        "CUDA_VISIBLE_DEVICES": "",
        # A thread that waits for the other sleeps: with other work on the machine, spinning takes five times as long.
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def report() -> float:
    """Prints how the answers got better and where all is to be found; returns the last round's exact match."""
    rounds = [read_samples(path) for path in sorted((DIRECTORY / GENERATIONS).glob("step_*.jsonl"))]
    if not rounds:
        sys.exit(f"No samples in {DIRECTORY / GENERATIONS}.")
    # The model's text is anything until it has learned: it must not reach the terminal as it is.
    print(f"\nStep  Exact match  {printable(rounds[0][0]['prompt_text'])}")
    for samples in rounds:
        print(f"{samples[0]['step']:4}  {exact_match(samples):11.2f}  {printable(samples[0]['generation'], 40)}")
    here = Path(os.path.relpath(DIRECTORY))
    mlflow = Path(os.path.relpath(Path(sys.executable).parent / "mlflow"))
    uri = TRACKING_URI.format(DIRECTORY)
    print("\nNo validation question was in the training data; each country was, in seven other wordings.")
    print(f"All samples, one JSONL file per round: {here / GENERATIONS}")
    print(f"The MLflow page: {shlex.join([str(mlflow), 'ui', '--backend-store-uri', uri])}")
    show = [os.path.relpath(sys.executable), "-m", "verl_valgen", "show", str(here / GENERATIONS)]
    print(f"How each answer changed, in a terminal: {shlex.join(show)}")
    print(f"How each answer changed, on a page: {here / GENERATIONS / 'index.html'} (open it in a browser)")
    return exact_match(rounds[-1])


def read_samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exact_match(samples: list[dict[str, Any]]) -> float:
    """The share of answers that are the reference, letter for letter."""
    return sum(sample["generation"] == sample["reference"] for sample in samples) / len(samples)


if __name__ == "__main__":
    main()
