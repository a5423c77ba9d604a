"""Whether there is memory for what comes next: asked before passes in which a rank that runs out loses the others."""

from __future__ import annotations

import torch


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether the allocator has so many bytes; always true on devices other than CUDA."""
    try:
        torch.empty(num_bytes if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    return True
