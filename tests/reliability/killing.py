"""Ends this process, and its process group, with SIGKILL at a chosen moment: nothing is flushed, nothing is tidied.

Moments are counted, not timed, so that every death can be had again. Loads no torch.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EVENTS = {"open", "os.mkdir", "os.remove", "os.rename"}  # `os.replace` is heard as a rename


def die() -> None:
    os.killpg(0, signal.SIGKILL)


def die_in_folder(directory: Path, moment: int) -> None:
    """At the `moment`-th, from 1, of what is done to the files of a folder from now on.

    Before a file is opened, renamed or removed, before a folder is made, before an fsync, and when half of what a file
    is to hold is written.
    """
    passed = _counter(moment)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and str(arguments[0]).startswith(str(directory)):
            passed()

    def is_of_folder(path: Any, mode: str) -> bool:
        return mode == "wb" and str(path).startswith(str(directory))

    sys.addaudithook(hear)
    os.fsync = _after(passed, os.fsync)
    _halve_writes(passed, is_of_folder)


def die_in_write(name: str) -> None:
    """When half of a file is written that is called so, for the time being or for good."""

    _halve_writes(die, lambda path, mode: mode == "wb" and f"/{name}" in str(path))


def die_in_call(target: str, number: int) -> None:
    """At the `number`-th call of a function, from 1; `target` is `module:name` or `module:class.name`."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, _after(_counter(number), getattr(owner, name)))


def _counter(number: int) -> Callable[[], None]:
    """Dies when it is called for the `number`-th time."""
    num_calls = 0

    def count() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == number:
            die()

    return count


def _after(before: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        before()
        return function(*args, **kwargs)

    return call


def _halve_writes(between: Callable[[], None], is_meant: Callable[[Any, str], bool]) -> None:
    """Files that are meant call `between` when half of what they are given is written."""
    open_any = io.open

    def open_one(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if is_meant(file, mode):
            return io.BufferedWriter(_ByHalves(between, file, mode))
        return open_any(file, mode, *args, **kwargs)

    builtins.open = io.open = open_one


class _ByHalves(io.FileIO):
    """Writes half of what it is first given, as a file may: a buffered one then asks again for the rest."""

    def __init__(self, between: Callable[[], None], path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self._between: Callable[[], None] | None = between

    def write(self, data: Any) -> int:
        if self._between is None:
            return super().write(data)
        num_written = super().write(data[: len(data) // 2])
        self._between()
        self._between = None
        return num_written
