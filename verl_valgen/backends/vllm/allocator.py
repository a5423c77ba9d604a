"""What must be so of torch's CUDA allocator for vLLM to have memory that it can give up asleep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def settings() -> dict[str, Any]:
    """What is in force, from whatever variable or call it comes."""
    return dict(torch.cuda.memory._snapshot().get("allocator_settings") or {})


@contextmanager
def fit_for_pools(device: torch.device) -> Iterator[None]:
    """Switches expandable segments off while open, where they are on, and puts back what vLLM changes.

    vLLM's pools cannot lie in them (pytorch#147851). It looks for them in PYTORCH_CUDA_ALLOC_CONF alone; but torch
    reads PYTORCH_ALLOC_CONF, too, and verl switches them on by a call. `max_split_size` it sets to what it reads in
    that variable, else to a MiB less than what stands for no limit: that is none, too, and stays.
    """
    if device.type != "cuda":
        yield
        return
    before = settings()
    change = torch.cuda.memory._set_allocator_settings
    if before.get("expandable_segments"):
        change("expandable_segments:False")
    try:
        yield
    finally:
        limit = before.get("max_split_size", -1)
        if limit > 0 and settings().get("max_split_size") != limit:
            change(f"max_split_size_mb:{limit // 2**20}")
        if before.get("expandable_segments"):
            change("expandable_segments:True")


def make_room(num_bytes: int, device: torch.device) -> None:
    """Gives blocks that torch keeps for later back to the driver, where the driver has less than this to give.

    vLLM's pools are made of the driver's memory, and cannot use what torch keeps.
    """
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < num_bytes:
        torch.cuda.empty_cache()
