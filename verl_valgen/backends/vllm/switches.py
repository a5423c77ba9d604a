"""What vLLM changes in a process, apart from environment variables: how each is read and set.

The list was found by comparing before and after; tests do so again.
"""

from __future__ import annotations

import gc
import importlib
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

UNKNOWN = object()


class Switch(NamedTuple):
    """Something of the process that is one way outside and another inside."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]
    is_kept: bool = True
    """Whether it is as vLLM left it when vLLM runs again."""

    @property
    def value(self) -> Any:
        try:
            return self.get()
        except (RuntimeError, AttributeError):  # torch refuses to read one setting that was made in two ways
            return UNKNOWN

    def put(self, value: Any) -> None:
        """Sets only what differs: some setters do more than set."""
        if not same(self.value, value):
            self.set(value)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, tuple) and any(isinstance(part, np.ndarray) for part in left):
        return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Of functions or settings by their names those that differ: others may change outside meanwhile."""
    return {name: value for name, value in after.items() if name not in before or before[name] != value}


def switches_of(device: torch.device) -> dict[str, Switch]:
    """By their names those that there are on this device, in this thread, with what is imported by now."""
    switches = {
        "dtype": Switch(torch.get_default_dtype, torch.set_default_dtype),
        "threads": Switch(torch.get_num_threads, _set_num_threads),
        "matmul": Switch(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        "deterministic": Switch(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        "default device": Switch(torch.get_default_device, torch.set_default_device),
        "grad": Switch(torch.is_grad_enabled, torch.set_grad_enabled),
        "affinity": Switch(lambda: os.sched_getaffinity(0), lambda cpus: os.sched_setaffinity(0, cpus)),
        "gc enabled": Switch(gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        "gc threshold": Switch(gc.get_threshold, lambda values: gc.set_threshold(*values)),
        "python random": Switch(random.getstate, random.setstate, False),
        "numpy random": Switch(np.random.get_state, np.random.set_state, False),
        "torch random": Switch(torch.get_rng_state, torch.set_rng_state, False),
        "start method": Switch(
            lambda: multiprocessing.get_start_method(allow_none=True),
            lambda method: multiprocessing.set_start_method(method, force=True),
        ),
        "logging": Switch(_logging_state, _set_logging_state, False),
    }
    for owner in _WITH_FUNCTIONS:
        switches[owner] = _functions(importlib.import_module(owner))
    for owner, class_name, name in _ATTRIBUTES:
        if owner in sys.modules:
            found = sys.modules[owner]
            switches[f"{owner}.{name}"] = _attribute(getattr(found, class_name) if class_name else found, name)
    with suppress(ImportError):  # vLLM warns of others' kernels, too, when Triton compiles them
        knobs = importlib.import_module("triton.knobs")
        switches["triton hook"] = _attribute(knobs.runtime, "jit_post_compile_hook")
        switches["triton autotuning"] = _attribute(knobs.autotuning, "print")
    for name in ("benchmark", "deterministic", "allow_tf32", "enabled"):
        switches[f"cudnn {name}"] = _attribute(torch.backends.cudnn, name)
    for name in ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
        switches[f"matmul {name}"] = _attribute(torch.backends.cuda.matmul, name)
    for name in ("flash", "mem_efficient", "math", "cudnn"):
        is_on, turn = (
            getattr(torch.backends.cuda, f"{part}") for part in (f"{name}_sdp_enabled", f"enable_{name}_sdp")
        )
        switches[f"sdp {name}"] = Switch(is_on, turn)
    for name in ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config"):
        switches[name] = _compiler_config(importlib.import_module(name))
    if threading.current_thread() is threading.main_thread():  # handlers are set from there alone
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
            switches[number.name] = _handler(number)
    if device.type == "cuda":
        switches |= {
            "cuda device": Switch(torch.cuda.current_device, torch.cuda.set_device),
            "cuda stream": Switch(torch.cuda.current_stream, torch.cuda.set_stream),
            "cuda random": Switch(
                lambda: torch.cuda.get_rng_state(device), lambda state: torch.cuda.set_rng_state(state, device), False
            ),
        }
    return switches


_WITH_FUNCTIONS = ("torch", "torch.cuda", "torch.accelerator", "torch.distributed", "torch.nn.functional")
"""Modules some of whose functions and classes vLLM replaces by its own: on CPU streams, events, memory and threads."""
_ATTRIBUTES = (
    ("sys", "", "excepthook"),
    ("threading", "", "excepthook"),
    ("huggingface_hub.constants", "", "HF_XET_HIGH_PERFORMANCE"),
    ("torch.distributions.distribution", "Distribution", "_validate_args"),
    ("transformers.processing_utils", "ProcessorMixin", "__init__"),
)
"""Others that it replaces or changes: module, class within it, name."""

_set_num_threads = torch.set_num_threads


def _attribute(owner: Any, name: str) -> Switch:
    return Switch(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _functions(module: Any) -> Switch:
    def get() -> dict[str, Any]:
        return {name: value for name, value in vars(module).items() if callable(value)}

    return Switch(get, lambda values: vars(module).update(values))


def _handler(number: signal.Signals) -> Switch:
    def restore(handler: Any) -> None:
        if handler is not None:  # one that was not set from Python
            signal.signal(number, handler)

    return Switch(lambda: signal.getsignal(number), restore)


def _compiler_config(module: Any) -> Switch:
    get = getattr(module, "get_config_copy", None) or module.shallow_copy_dict  # the first one from torch 2.7 on

    def restore(values: Mapping[str, Any]) -> None:
        current = get()
        for name, value in values.items():
            if current[name] != value:
                with suppress(AttributeError):  # an alias
                    setattr(module, name, value)

    return Switch(get, restore)


def _logging_state() -> dict[str, tuple[Any, ...]]:
    """Of every logger by its name: level, handlers, filters, and whether it hands on and is on."""
    loggers = {"": logging.root, **logging.root.manager.loggerDict}
    return {
        name: (logger.level, list(logger.handlers), list(logger.filters), logger.propagate, logger.disabled)
        for name, logger in loggers.items()
        if isinstance(logger, logging.Logger)
    } | {"\0": (logging.root.manager.disable,)}


def _set_logging_state(state: dict[str, tuple[Any, ...]]) -> None:
    logging.disable(state["\0"][0])
    for name, values in state.items():
        if name != "\0":
            logger = logging.getLogger(name)
            logger.level, logger.handlers[:], logger.filters[:], logger.propagate, logger.disabled = values
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]  # of what levels loggers found in force
