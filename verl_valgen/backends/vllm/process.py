"""Keeps what vLLM changes in the process apart from the process: in force only while vLLM runs.

It sets environment variables, seeds random states, replaces functions of torch, configures logging, freezes garbage;
and reads variables again while it runs. What is listed here was found by comparing before and after; tests do so again.
What remains for good: its modules are imported, with the configurations that it registers with transformers, and with
its own operators and corrections of single functions of inductor. (Over 200 lines: one list of what there is.)
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
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch._dynamo

from verl_valgen.patching import patched
from verl_valgen.text import describe

logger = logging.getLogger(__name__)

QUIET = logging.CRITICAL
"""From which level on vLLM's own messages are shown, unless VLLM_LOGGING_LEVEL says otherwise. (Where it fails it dumps
its configuration and all requests under way: what it raises is told in our own line.)"""


class Switch(NamedTuple):
    """Something of the process that is one way outside and another inside."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]
    is_kept: bool = True
    """Whether it is as vLLM left it when vLLM runs again."""


class Compartment:
    """The process as vLLM wants it, for all of its engines: vLLM is imported once, and what it sets and replaces then
    has to be in force for the second engine as for the first.

    Args:
        environment: Variables to begin with.
        device: Whose random state is put back, too.
        compile: Whether torch.compile does anything inside. vLLM compiles small functions whatever it is told.
    """

    _environment: ClassVar[dict[str, str | None]] = {}
    """What differs inside; None: not set."""
    _values: ClassVar[dict[str, Any]] = {}
    """The same of switches, by name."""
    _is_entered: ClassVar[bool] = False

    def __init__(self, environment: Mapping[str, str], device: torch.device, *, compile: bool) -> None:
        Compartment._environment = {**Compartment._environment, **environment}
        self.device, self.compile = device, compile

    @contextmanager
    def entered(self) -> Iterator[None]:
        """In force while open. May be opened within itself. Not for two threads at once."""
        if Compartment._is_entered:
            yield
            return
        switches = _switches(self.device)
        outside = {name: value for name, switch in switches.items() if (value := _value(switch)) is not _UNKNOWN}
        outer_environment = dict(os.environ)
        Compartment._is_entered = True
        try:
            _apply_environment(Compartment._environment)
            for name, value in Compartment._values.items():
                if name in switches:  # some are the main thread's alone
                    _put(switches[name], value)
            compiling = nullcontext() if self.compile else patched(torch._dynamo.config, "disable", True)
            with _in_order(outside.get("cuda stream")), _frozen(), _quiet_vllm(), compiling:
                yield
        finally:
            Compartment._is_entered = False
            Compartment._environment = _differences(outer_environment, dict(os.environ))
            _apply_environment(_differences(dict(os.environ), outer_environment))
            for name, value in outside.items():
                try:
                    self._put_back(name, switches[name], value)
                except Exception as e:  # the others are to be put back all the same
                    logger.warning("what vLLM has changed is not as it was: %s: %s", name, describe(e))

    def _put_back(self, name: str, switch: Switch, value: Any) -> None:
        inside = _value(switch)
        if switch.is_kept and inside is not _UNKNOWN:
            self._values.pop(name, None)
            if not _same(inside, value):
                self._values[name] = _changed(value, inside) if isinstance(value, dict) else inside
        _put(switch, value)


_UNKNOWN = object()


def _value(switch: Switch) -> Any:
    try:
        return switch.get()
    except (RuntimeError, AttributeError):  # torch refuses to read one setting that was made in two ways
        return _UNKNOWN


def _put(switch: Switch, value: Any) -> None:
    """Sets only what differs: some setters do more than set."""
    if not _same(_value(switch), value):
        switch.set(value)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, tuple) and any(isinstance(part, np.ndarray) for part in left):
        return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def _differences(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str | None]:
    changed: dict[str, str | None] = {name: value for name, value in after.items() if before.get(name) != value}
    return changed | {name: None for name in before if name not in after}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Of functions or settings by their names those that differ: others may change outside meanwhile."""
    return {name: value for name, value in after.items() if name not in before or before[name] != value}


def _apply_environment(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _quiet_vllm() -> Iterator[None]:
    """vLLM says dozens of lines at INFO; and it says with warnings what concerns those who configure it.

    Where others have imported vLLM before, it has configured its logging then.
    """
    logger = logging.getLogger("vllm")
    level, is_wanted = logger.level, "VLLM_LOGGING_LEVEL" in os.environ
    if not is_wanted:
        logger.setLevel(QUIET)
    with warnings.catch_warnings():
        if not is_wanted:
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def _in_order(outer: torch.cuda.Stream | None) -> Iterator[None]:
    """vLLM has a stream of its own: its work comes after what was launched before, and before what comes after."""
    if outer is None:
        yield
        return
    torch.cuda.current_stream(outer.device).wait_stream(outer)
    try:
        yield
    finally:
        outer.wait_stream(torch.cuda.current_stream(outer.device))


@contextmanager
def _frozen() -> Iterator[None]:
    """Lets garbage be looked for among what is made while open alone: vLLM looks for it whenever it falls asleep.

    To count what is frozen takes as long as to look, but for nothing.
    """
    was_frozen = gc.get_freeze_count() > 0
    if not was_frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()
        elif not gc.get_freeze_count():
            gc.freeze()


def _switches(device: torch.device) -> dict[str, Switch]:
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
