"""What training could notice of somebody else in its process, read here and not as the code under test does."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import signal
import sys
import types
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import torch


def observed() -> dict[str, object]:
    modules = ("torch", "torch.cuda", "torch.accelerator", "torch.random", "torch.nn.functional", "torch.distributed")
    functions = {
        f"{name}.{attribute}": value
        for name in modules
        for attribute, value in vars(import_module(name)).items()
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type)
    }
    compilers = {
        f"{name}.{key}": repr(value)
        for name in ("torch._dynamo.config", "torch._inductor.config")
        for key, value in import_module(name).get_config_copy().items()
    }
    loggers = {
        f"logger {name}": (logger.level, list(logger.handlers), logger.propagate, logger.disabled)
        for name, logger in {"": logging.root, **logging.root.manager.loggerDict}.items()
        if isinstance(logger, logging.Logger)
    }
    return {
        **functions,
        **compilers,
        **loggers,
        **{f"${name}": value for name, value in os.environ.items()},
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "attention": [
            getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
            for name in ("flash", "mem_efficient", "math", "cudnn")
        ],
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count() > 0),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "hook": sys.excepthook,
        "start method": multiprocessing.get_start_method(allow_none=True),
        "affinity": os.sched_getaffinity(0),
        "warnings": list(warnings.filters),
        "memory policy": maps.read_text().split()[1:2] if (maps := Path("/proc/self/numa_maps")).exists() else [],
        "grad": torch.is_grad_enabled(),
        "validation": torch.distributions.Distribution._validate_args,
        **(_observed_of_cuda() if torch.cuda.is_available() else {}),
    }


def _observed_of_cuda() -> dict[str, object]:
    settings = dict(torch.cuda.memory._snapshot().get("allocator_settings") or {})
    settings.pop("max_split_size", None)  # two numbers mean that there is none
    matmul = torch.backends.cuda.matmul
    return {
        "CUDA random": torch.cuda.get_rng_state().tolist(),
        "CUDA device": torch.cuda.current_device(),
        "CUDA stream": torch.cuda.current_stream(),
        "TF32": (torch.backends.cudnn.allow_tf32, matmul.allow_tf32),
        "reduced": (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction),
        "libraries": (
            torch.backends.cuda.preferred_blas_library(),
            torch.backends.cuda.preferred_linalg_library(),
        ),
        "allocator": settings,
    }


def assert_unchanged(before: dict[str, object], when: str) -> None:
    """Compares with what is observed now."""
    after = observed()
    changed = {name: (value, after.get(name)) for name, value in before.items() if after.get(name) != value}
    new = {name for name in after if name not in before and name.startswith("$")}
    assert not changed, when
    assert not new, when
