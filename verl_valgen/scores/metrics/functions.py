"""Functions of a user's as metrics: `f(sample)`, or with the signature of verl's reward functions."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from verl_valgen.records import Sample
from verl_valgen.scores.metrics.base import Metric
from verl_valgen.settings.checks import ConfigError, plain

_MAX_SOURCE_BYTES = 1 << 20

_VERLS_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""The arguments of verl's reward functions; each function takes some of them."""


_NAME = re.compile("([A-Za-z0-9_-]{1,64})=(.*)", re.DOTALL)


def parts(spec: str) -> tuple[str, str, str]:
    """Splits the specification of a metric into the name that it is recorded as, its file or module, its name there.

    The last two are "" for a metric of ours. `name=file.py:function` records a function under another name.
    """
    named = _NAME.fullmatch(spec)
    path, _, attribute = (named[2] if named else spec).rpartition(":")
    return named[1] if named else attribute.rpartition(".")[2], path, attribute if path else ""


def metric_name(spec: str) -> str:
    """The name that a metric is recorded as: its own, or the function's."""
    return parts(spec)[0]


class OwnMetric(Metric):
    """A function that is named as `file.py:function` or `module:function`."""

    def __init__(self, spec: str) -> None:
        self.name, path, attribute = parts(spec)
        function: Any = _module_of_file(path) if path.endswith(".py") else importlib.import_module(path)
        for name in attribute.split("."):
            function = getattr(function, name)
        self._function = function
        parameters = _parameters(function)
        self._is_verls = {"solution_str", "ground_truth"} <= parameters.keys()
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._arguments = [name for name in _VERLS_ARGUMENTS if takes_any or name in parameters]

    def __call__(self, sample: Sample) -> float | Mapping[str, Any] | None:
        if not self._is_verls:
            return self._function(sample)
        ground_truth = sample.reference if sample.ground_truth is None else sample.ground_truth
        if ground_truth is None:
            return None
        # verl gives its functions all of an answer, and they look for the answer proper themselves.
        said = sample.generation if sample.whole_generation is None else sample.whole_generation
        values = (sample.data_source, said, ground_truth, sample.extra_info or {})
        given = dict(zip(_VERLS_ARGUMENTS, values, strict=True))
        return self._function(**{name: given[name] for name in self._arguments})


def check_function(spec: str, source: str) -> None:
    """Raises `ConfigError` where `spec` names no function that can score.

    Its source is read; nothing is executed but what importing the packages around a module does.
    """
    _, path, attribute = parts(spec)
    shown = plain(spec, 200)
    if path.endswith(".py"):
        file: Path | None = Path(path)
        try:
            is_file = Path(path).is_file()
        except (OSError, ValueError) as e:  # of a name that no file can have, of a folder that is not open to us
            raise ConfigError(f"{source}: {shown}: {plain(str(e), 200)}") from None
        if not is_file:
            raise ConfigError(f"{source}: {shown}: there is no such file")
    else:
        try:
            module_spec = importlib.util.find_spec(path)
        except (ImportError, ValueError, AttributeError) as e:
            raise ConfigError(f"{source}: {shown}: {plain(str(e), 200)}") from None
        if module_spec is None:
            raise ConfigError(f"{source}: {shown}: there is no such module")
        file = Path(module_spec.origin) if module_spec.origin and module_spec.origin.endswith(".py") else None
    if file is None:
        return  # no source to read: it will be seen when it is loaded
    if file.stat().st_size > _MAX_SOURCE_BYTES:
        raise ConfigError(f"{source}: {shown}: the file is larger than {_MAX_SOURCE_BYTES >> 20} MiB")
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise ConfigError(f"{source}: {shown}: it is no Python: {plain(str(e), 200)}") from None
    definition = _definition(tree, attribute.partition(".")[0])
    if definition is None:
        raise ConfigError(f"{source}: {shown}: the file defines no {plain(attribute)}")
    if isinstance(definition, ast.AsyncFunctionDef):
        raise ConfigError(f"{source}: {shown} must not be async")
    if isinstance(definition, ast.FunctionDef) and not _can_score(definition):
        raise ConfigError(
            f"{source}: {shown} must take a sample, or data_source, solution_str, ground_truth and extra_info"
        )


def _definition(tree: ast.Module, name: str) -> ast.stmt | None:
    """The last statement of a module that binds a name; a star import might bind any."""
    definition = None
    for statement in _statements(tree):
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = {statement.name}
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names = {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        else:
            continue
        if names & {name, "*"}:
            definition = statement
    return definition


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a module, in order, within `if`, `try` and `with` too, but not within functions and classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _statements(child)


def _can_score(function: ast.FunctionDef) -> bool:
    arguments = function.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if {"solution_str", "ground_truth"} <= {*positional, *(argument.arg for argument in arguments.kwonlyargs)}:
        return True
    num_required = len(positional) - len(arguments.defaults)
    takes_one = num_required <= 1 and (positional or arguments.vararg is not None)
    return bool(takes_one) and all(default is not None for default in arguments.kw_defaults)


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # some that are written in C tell nothing
        return {}


def _module_of_file(path: str) -> Any:
    """The module in a file, loaded once in this process."""
    name = f"verl_valgen_metric_{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None, "a path that ends in .py has a loader"
        assert spec.loader is not None, "a path that ends in .py has a loader"
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
