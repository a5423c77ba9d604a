"""Puts back what a round changes in the process: random states, cuBLAS workspaces. Knows nothing of what runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Puts python's, numpy's and torch's random states (host and `device`) back at the end, whatever happens."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def preserved_blas_workspaces(device: torch.device) -> Iterator[None]:
    """Frees, at the end, the workspaces that cuBLAS was given for streams of ours.

    PyTorch keeps one for every stream and thread for good. There is no other way than to drop all; the current stream
    gets its own back at once, if it had one, and that of autograd's thread comes back with its next matrix product.
    """
    if device.type != "cuda":
        yield
        return
    with_workspace = torch.cuda.memory_allocated(device)
    torch._C._cuda_clearCublasWorkspaces()
    had_workspace = torch.cuda.memory_allocated(device) < with_workspace
    if had_workspace:
        torch.cuda.current_blas_handle()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
        if had_workspace:
            torch.cuda.current_blas_handle()
