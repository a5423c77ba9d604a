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
def without_expandable_segments(device: torch.device) -> Iterator[None]:
    """Switches expandable segments off while open, where they are on.

    vLLM's pools cannot lie in them (pytorch#147851). It looks for them in PYTORCH_CUDA_ALLOC_CONF alone; but torch
    reads PYTORCH_ALLOC_CONF, too, and verl switches them on by a call.
    """
    if device.type != "cuda" or not settings().get("expandable_segments"):
        yield
        return
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    try:
        yield
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def make_room(num_bytes: int, device: torch.device) -> None:
    """Gives blocks that torch keeps for later back to the driver, where the driver has less than this to give.

    vLLM's pools are made of the driver's memory, and cannot use what torch keeps.
    """
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < num_bytes:
        torch.cuda.empty_cache()
