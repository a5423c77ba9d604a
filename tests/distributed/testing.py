"""Runs a function on several ranks, in processes of their own, with gloo."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(function: Callable[..., Any], world_size: int, directory: Path, *args: Any) -> list[Any]:
    """What `function(*args)` returned on each rank. An exception on a rank is raised here."""
    # Rendezvous by a file: a port that was free a moment ago may be another test's by now.
    rendezvous = f"file://{directory / uuid.uuid4().hex}"
    mp.spawn(_run, (function, world_size, rendezvous, directory, args), nprocs=world_size, join=True)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(
    rank: int, function: Callable[..., Any], world_size: int, rendezvous: str, directory: Path, args: tuple
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        torch.save(function(*args), directory / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
