"""Memory of a device: whether there is enough for what comes next, and what is in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether the allocator has so many bytes; always true on devices other than CUDA.

    To be asked before passes in which a rank that runs out of memory would lose the others.
    """
    try:
        torch.empty(num_bytes if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    return True


def as_list(tensor: Tensor) -> list[Any]:
    """`tensor.tolist()`, which leaves the device to other threads while it waits for this thread's stream.

    A copy to ordinary memory waits within CUDA's driver, where it holds a lock that every launch of the process needs:
    training would stand still beside it.
    """
    if tensor.device.type == "cuda":
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor.tolist()
