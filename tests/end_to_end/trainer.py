"""Runs verl's own trainer as a subprocess, as a user does.

Which of its two trainers is the installed verl's matter: the tests say `strategy("fsdp2")`, and here is how the trainer
spells it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

VERL_VERSION = Version(version("verl"))
FSDP_SFT, ENGINE = "verl.trainer.fsdp_sft_trainer", "verl.trainer.sft_trainer"
# verl 0.6 and 0.7.0 have both: there the variable asks for the second.
VERL_MODULE = os.environ.get("VALGEN_TEST_TRAINER") or (FSDP_SFT if Version("0.7.1") > VERL_VERSION else ENGINE)
RAY = "verl.trainer.sft_trainer_ray"
HAS_RAY = Version("0.7") <= VERL_VERSION  # the trainer, whether or not Ray itself is installed
HAS_ENGINES = VERL_MODULE != FSDP_SFT
TRAINER_NAME = "SFTTrainer" if HAS_ENGINES else "FSDPSFTTrainer"
CONFIG_NAME = "sft_trainer_engine" if HAS_ENGINES else "sft_trainer"
GENERATION_CONFIG = ["--config-path", "config", "--config-name", f"{CONFIG_NAME}_with_generation"]
MODEL_KEY = "model.path" if HAS_ENGINES else "model.partial_pretrain"
VAL_BATCH_SIZE = 8 if HAS_ENGINES else 4
"""Rows of one validation batch on a single rank, with `Assets.overrides`: a global batch, or a micro-batch."""
IN_ITS_FOLDER = ["trainer.default_local_dir=checkpoints", "hydra.run.dir=hydra"]
TIMEOUT_S = 600


@dataclass(frozen=True)
class Assets:
    """A small model and its data."""

    directory: Path

    @property
    def model(self) -> Path:
        return self.directory / "model"

    def overrides(self, *, multiturn: bool = HAS_ENGINES) -> list[str]:
        """verl's overrides for a run of 3 steps with validations at step 2 and, early exit, step 3.

        Args:
            multiturn: Must be true with engines: their trainer has no single-turn data set.
        """
        assert multiturn or not HAS_ENGINES
        kind = "multiturn" if multiturn else "singleturn"
        return [
            f"data.train_files={self.directory}/{kind}/train.parquet",
            f"data.val_files={self.directory}/{kind}/val.parquet",
            "data.train_batch_size=8",
            "data.micro_batch_size_per_gpu=4",
            "data.max_length=256",
            *(["data.multiturn.enable=true"] if multiturn and not HAS_ENGINES else []),
            f"{MODEL_KEY}={self.model}",
            "model.enable_gradient_checkpointing=false",
            "optim.lr=1e-3",  # enough for other answers at every round; with more they soon are all the same
            "trainer.total_epochs=1",
            "trainer.total_training_steps=3",
            "trainer.test_freq=2",
            "trainer.project_name=project",
            "trainer.experiment_name=experiment",
            "trainer.logger=[console]",
        ]


def strategy(name: str) -> str:
    """The override for FSDP1 (`fsdp`) or FSDP2 (`fsdp2`)."""
    return f"{'engine' if HAS_ENGINES else 'model'}.strategy={name}"


PROGRAM = """
import hydra
from {module} import {trainer}
from verl_valgen import ValidationGenerationMixin, run_sft


class MyTrainer(ValidationGenerationMixin, {trainer}):
{body}


@hydra.main(config_path="pkg://verl.trainer.config", config_name="{config}", version_base=None)
def main(config):
    run_sft(config, MyTrainer)


if __name__ == "__main__":
    main()
"""


def write_program(path: Path, body: str, *, before: str = "", module: str = VERL_MODULE) -> Path:
    """Writes a program with a trainer of its own and returns its path.

    Args:
        body: Of the trainer's class.
        before: Goes before the first import.
        module: That of verl's trainer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    body = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    path.write_text(before + PROGRAM.format(module=module, trainer=TRAINER_NAME, config=CONFIG_NAME, body=body))
    return path


LATE = re.compile(r"\w+: a round takes longer than [\d.]+ s to record; training does not wait")


@dataclass(frozen=True)
class Run:
    """A finished run."""

    directory: Path
    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def warnings(self) -> list[str]:
        """Ours, without where and when."""
        return re.findall(r"\[verl_valgen[.\w]*\]\[WARNING\] - (.*)", self.output)

    @property
    def warnings_but_late(self) -> list[str]:
        """Without those of records that take long: a disk may be slow for a moment, on a busy machine."""
        return [warning for warning in self.warnings if not LATE.fullmatch(warning)]

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def generations(self) -> Path:
        return self.checkpoints / "generations"

    def samples(self, step: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.generations / f"step_{step:08d}.jsonl").read_text().splitlines()]

    def logged(self, key: str) -> list[str]:
        """What verl's console logger printed under a key, step by step, as text: every digit counts."""
        prefix = f"{key}:"
        return [
            part.removeprefix(prefix)
            for line in self.stdout.splitlines()
            for part in line.split(" - ")
            if part.startswith(prefix)
        ]


def environment_of_a_run(own: Mapping[str, str]) -> dict[str, str]:
    """What a run finds: what there is, but for what would set it up in another way, and what is its own."""
    found = {
        name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "WANDB_", "MLFLOW_", "RAY_"))
    }
    return found | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(own)


def run(
    directory: Path,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    num_ranks: int | None = None,
    program: Path | None = None,
    python: str = sys.executable,
    module: str = VERL_MODULE,
) -> Run:
    """One run in `directory`.

    Args:
        num_ranks: None runs without torchrun.
        program: The file to run; None is verl's trainer by its module's name.
        module: That name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    launcher = [python]
    if num_ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    process = subprocess.run(
        [*launcher, *(["-m", module] if program is None else [str(program)]), *arguments, *IN_ITS_FOLDER],
        cwd=directory,
        env=environment_of_a_run(environment or {}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    (directory / "stdout.txt").write_text(process.stdout)
    (directory / "stderr.txt").write_text(process.stderr)
    return Run(directory, process.returncode, process.stdout, process.stderr)


def shown_lines(samples: Sequence[Mapping[str, Any]], *, has_strategies: bool = False) -> list[str]:
    """The console's lines about one prompt, by the records of its answers, one of each strategy.

    Args:
        has_strategies: Whether answers are named after their strategies, those that are sampled with a number.
    """
    first, judged, ends = samples[0], [], {"length": "cut off", "stop": "ended by a stop string"}
    i = first["index"] + 1
    lines = [f"Prompt {i}: {first['prompt_text']}"]
    for sample in samples:
        number = ", 1" if sample["params"]["do_sample"] else ""
        label = f" ({sample['strategy']}{number})" if has_strategies else ""
        text = sample["generation"].replace("\n", "\\n")
        lines.append(f"Generation {i}{label}: {text}")
        scores = [f"{name} {score:.3g}" for name, score in sample["scores"].items() if score is not None]
        remarks = ["empty"] * (not sample["generation"].strip())
        remarks += [ends[reason] for reason in (sample["finish_reason"],) if reason in ends]
        if said := "; ".join([", ".join(scores)] * bool(scores) + remarks):
            judged.append(f"Scores {i}{label}: {said}")
    expected = [] if first["reference"] is None else [f"Expected {i}: {first['reference']}"]
    return [*lines, *expected, *judged, f"Source {i}: {first['origin']}", "-" * 50]
