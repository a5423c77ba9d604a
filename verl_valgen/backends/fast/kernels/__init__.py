"""Triton kernels for steps of decoding, each of which does what several of torch's operations do.

The tensor operations stay beside them: as the reference, for CPU, and for where Triton cannot compile. The modules in
this folder import Triton and are imported only where `are_available` says yes.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from verl_valgen.text import describe

logger = logging.getLogger(__name__)

_given_up: list[str] = []
"""Why this process does without kernels that it could have."""


def are_available(device: torch.device) -> bool:
    """Whether Triton's kernels compile and run on a device; tried once per process, and said why not at DEBUG.

    They are where Triton comes with torch and there is a C compiler, which Triton needs once for its own launcher. For
    CPU it does not compile: there they run by its interpreter alone (TRITON_INTERPRET=1).
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return not _given_up and _why_unavailable(device.type) is None


@contextmanager
def given_up(reason: str) -> Iterator[None]:
    """Does without kernels from now on, and says why at DEBUG; with them again where the block raises."""
    _given_up.append(reason)
    try:
        yield
    except BaseException:
        _given_up.remove(reason)
        raise
    logger.debug("no Triton kernels any more, torch's operations instead: %s", reason)


@functools.cache
def _why_unavailable(device_type: str) -> str | None:
    """Says why no kernel runs on a kind of device, None if one does."""
    reason = None
    try:
        _try_kernel(torch.device(device_type))
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever a missing package, compiler or driver raises
        reason = describe(e)
    if reason is not None:
        logger.debug("no Triton kernels on %s, torch's operations instead: %s", device_type, reason)
    return reason


def _try_kernel(device: torch.device) -> None:
    """Runs a small kernel."""
    from verl_valgen.backends.fast.kernels.activation import silu_and_mul

    one = torch.ones(1, 2, device=device)
    if not torch.allclose(silu_and_mul(one), torch.nn.functional.silu(one[:, :1])):
        raise RuntimeError("a kernel's result is wrong")
