"""Predicts the rows and steps of a run from its configuration alone, before anything is loaded.

Rows are counted in the footers of parquet files, which costs no more than opening them. A function returns None where
it cannot be certain: remote files, a data set of the user's own, a run that may resume.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from omegaconf import DictConfig, ListConfig, OmegaConf

from verl_valgen.hosts.schedule import Schedule


def num_rows(config: DictConfig, split: Literal["train", "val"]) -> int | None:
    """The length that verl's data set of a split will have."""
    total = num_rows_in_files(config, split)
    limit = OmegaConf.select(config, f"data.{split}_max_samples", default=-1)
    return total if total is None or limit <= 0 else min(total, limit)


def num_rows_in_files(config: DictConfig, split: Literal["train", "val"]) -> int | None:
    """The rows of all files of a split."""
    files = config.data[f"{split}_files"]
    if not files or OmegaConf.select(config, "data.custom_cls.path"):
        return None
    from pyarrow import parquet

    paths = [Path(file).expanduser() for file in (files if isinstance(files, ListConfig) else [files])]
    if not all(path.is_file() for path in paths):
        return None
    return sum(parquet.read_metadata(path).num_rows for path in paths)


def num_batches(rows: int, num_ranks: int, batch_size: int) -> int:
    """Batches on each data-parallel rank: verl drops rows that not all ranks get, then batches that are incomplete.

    Args:
        batch_size: Rows of a batch on one rank.
    """
    return rows // num_ranks // batch_size


def new_schedule(config: DictConfig, num_ranks: int) -> Schedule | None:
    """The schedule of a run that starts at step 0.

    Args:
        num_ranks: Data-parallel ranks.
    """
    rows = num_rows(config, "train")
    if rows is None or _may_resume(config):
        return None
    trainer = config.trainer
    steps_per_epoch = num_batches(rows, num_ranks, config.data.train_batch_size // num_ranks)
    available_steps = steps_per_epoch * trainer.total_epochs
    return Schedule(
        start_step=0,
        available_steps=available_steps,
        total_training_steps=available_steps if trainer.total_training_steps is None else trainer.total_training_steps,
        test_freq=steps_per_epoch if trainer.test_freq == "after_each_epoch" else trainer.test_freq,
    )


def _may_resume(config: DictConfig) -> bool:
    trainer = config.trainer
    if OmegaConf.select(trainer, "resume_mode", default="auto") == "disable":
        return False
    if OmegaConf.select(trainer, "resume_from_path") is not None:
        return True
    return (Path(trainer.default_local_dir) / "latest_checkpointed_iteration.txt").exists()
