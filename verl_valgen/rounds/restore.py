"""Puts back what a round changes in the process: random states, cuBLAS workspaces, the garbage collector's count.

Knows nothing of what runs.
"""

from __future__ import annotations

import gc
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
def uncounted_objects() -> Iterator[None]:
    """Keeps what is made while open from bringing on a collection of all garbage, in the middle of a training step.

    Python looks through all objects, for a quarter of a second where torch and transformers are loaded, once those that
    have grown old since the last time are a quarter of the others. A copy of a model is tens of thousands that grow old
    in a round; training makes hardly any. What is made here is old at once, without having been counted.
    """
    if not gc.isenabled() or gc.get_freeze_count() > 0:  # the process has its own way with garbage
        yield
        return
    gc.collect(1)  # what is young and garbage is not to grow old
    gc.disable()
    try:
        yield
        gc.freeze()
        gc.unfreeze()  # into the oldest generation
    finally:
        gc.enable()


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
