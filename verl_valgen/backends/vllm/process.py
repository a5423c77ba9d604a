"""Keeps what vLLM changes in the process apart from the process: in force only while vLLM runs.

It sets environment variables, seeds random states, replaces functions of torch, configures logging, freezes garbage;
and reads variables again while it runs. `switches.py` lists all but the variables. What remains for good: its modules
are imported, with the configurations that it registers with transformers, and with its own operators and corrections of
single functions of inductor.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch._dynamo

from verl_valgen.backends.vllm.switches import UNKNOWN, Switch, changed, same, switches_of
from verl_valgen.patching import patched
from verl_valgen.text import describe

logger = logging.getLogger(__name__)

QUIET = logging.CRITICAL
"""From which level on vLLM's own messages are shown, unless VLLM_LOGGING_LEVEL says otherwise. (Where it fails it dumps
its configuration and all requests under way: what it raises is told in our own line.)"""


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
        switches = switches_of(self.device)
        outside = {name: value for name, switch in switches.items() if (value := switch.value) is not UNKNOWN}
        outer_environment = dict(os.environ)
        Compartment._is_entered = True
        has_begun = False
        try:
            _apply_environment(Compartment._environment)
            for name, value in Compartment._values.items():
                if name in switches:  # some are the main thread's alone
                    switches[name].put(value)
            compiling = nullcontext() if self.compile else patched(torch._dynamo.config, "disable", True)
            with _in_order(outside.get("cuda stream")), _frozen(), _quiet_vllm(), compiling:
                has_begun = True
                yield
        finally:
            Compartment._is_entered = False
            if has_begun:
                Compartment._environment = _differences(outer_environment, dict(os.environ))
            _apply_environment(_differences(dict(os.environ), outer_environment))
            for name, value in outside.items():
                try:
                    if has_begun:
                        self._keep(name, switches[name], value)
                    switches[name].put(value)
                except Exception as e:  # the others are to be put back all the same
                    logger.warning("what vLLM has changed is not as it was: %s: %s", name, describe(e))

    def _keep(self, name: str, switch: Switch, outside: Any) -> None:
        """Remembers how vLLM leaves something, where that differs from outside, for the next time that it runs."""
        inside = switch.value
        if switch.is_kept and inside is not UNKNOWN:
            Compartment._values.pop(name, None)
            if not same(inside, outside):
                Compartment._values[name] = changed(outside, inside) if isinstance(outside, dict) else inside


def _differences(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str | None]:
    new: dict[str, str | None] = {name: value for name, value in after.items() if before.get(name) != value}
    return new | {name: None for name in before if name not in after}


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
