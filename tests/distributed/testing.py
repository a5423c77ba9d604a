"""Runs a function on several ranks, in processes of their own, with gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(function: Callable[..., Any], world_size: int, directory: Path, *args: Any) -> list[Any]:
    """What `function(*args)` returned on each rank. An exception on a rank is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_run, (function, world_size, port, directory, args), nprocs=world_size, join=True)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(rank: int, function: Callable[..., Any], world_size: int, port: int, directory: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(world_size)
    dist.init_process_group("gloo")
    try:
        torch.save(function(*args), directory / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
