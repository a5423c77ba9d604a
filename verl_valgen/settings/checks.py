"""Checks of single configuration values: read one, say what is allowed, quote what came instead.

This module owns `ConfigError`, how a value is read, and how several mistakes become one error. It knows neither keys
nor variables. The kinds of checks stay in one file, for each is a few lines.

A value from YAML has to have its type: `true` is no integer, and `5.0` neither. A text is read strictly and the same
way whether it comes from an environment variable or from YAML: `temperature: ${oc.env:MY_TEMPERATURE}` is a text too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

# Python's own int() and float() also take "5_0", "٥" and "nan".
_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

_MAX_BITS = 63
"""The bits that an integer may have beside its sign: torch holds no larger ones."""

_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


class ConfigError(ValueError):
    """A configuration that cannot be used.

    The message has one line for each mistake, which names the key or variable, the value, and what is allowed.
    """


class Mistakes:
    """The mistakes of a configuration, collected so that all of them can be told at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes a `ConfigError` that is raised within the block, and leaves the block."""
        try:
            yield
        except ConfigError as e:
            self.lines += [line for line in str(e).split("\n") if line not in self.lines]

    def raise_if_any(self) -> None:
        if self.lines:
            raise ConfigError("\n".join(self.lines))


def quoted(value: object, max_chars: int = 80) -> str:
    """`value` as an error message may hold it: ASCII without control characters, and short."""
    try:
        text = ascii(value)
    except Exception:  # an integer of more than 4300 digits, deep nesting, an object's own `__repr__`
        text = f"{type(value).__name__} that cannot be shown"
    return plain(text, max_chars)  # an object's own words may have control characters


def plain(text: str, max_chars: int = 80) -> str:
    """A name or another library's message as an error message may hold it: like `quoted`, but without the quotes."""
    shown = "".join(
        char if char.isascii() and char.isprintable() else ascii(char)[1:-1] for char in text[: max_chars + 1]
    )
    return shown if len(shown) <= max_chars else shown[: max_chars - 3] + "..."


class Check(NamedTuple):
    """The rule for the value of one key."""

    read: Callable[[Any], Any]
    """Gives the value its type, or raises ValueError."""
    accepts: Callable[[Any], bool]
    allowed: str
    """Completes the sentence "temperature must be ..."."""

    def __call__(self, value: object, source: str) -> Any:
        """The value in its proper type; raises `ConfigError` naming `source`, where the value comes from."""
        try:
            result = self.read(value)
        except (ValueError, RecursionError):  # JSON can be nested more deeply than Python can follow
            result = None
        if result is None or not self.accepts(result):
            raise ConfigError(f"{source} must be {self.allowed}, got {quoted(value)}")
        return result


def boolean() -> Check:
    return Check(_read_boolean, lambda _: True, "a boolean (true or false)")


def boolean_or(name: str) -> Check:
    def read(value: object) -> Any:
        return name if isinstance(value, str) and value.strip().lower() == name else _read_boolean(value)

    return Check(read, lambda _: True, f"a boolean (true or false) or {name}")


def integer(allowed: str, accepts: Callable[[int], bool]) -> Check:
    return Check(_read_integer, accepts, allowed)


def at_least(least: int, meaning: str = "") -> Check:
    return integer(f"an integer >= {least}" + (f" ({meaning})" if meaning else ""), lambda x: x >= least)


def number(allowed: str, accepts: Callable[[float], bool]) -> Check:
    return Check(_read_number, accepts, allowed)


def share() -> Check:
    return number("a number in (0, 1]", lambda x: 0 < x <= 1)


def one_of(*names: str, aliases: Mapping[str, str] | None = None) -> Check:
    spellings = {name: name for name in names} | dict(aliases or {})
    return Check(
        lambda value: spellings.get(_read_text(value).lower()), lambda _: True, f"one of {', '.join(spellings)}"
    )


def name() -> Check:
    """A name that others check: in lower case, as names are compared."""
    return Check(lambda value: _read_text(value).lower(), bool, "a name")


def auto_or(check: Check) -> Check:
    def read(value: object) -> Any:
        return "auto" if isinstance(value, str) and value.strip().lower() == "auto" else check.read(value)

    return Check(read, lambda x: x == "auto" or check.accepts(x), f"auto or {check.allowed}")


def text() -> Check:
    return Check(_read_text, bool, "a text that is not empty")


def optional_text() -> Check:
    """A text, and "" for null."""
    return Check(lambda value: "" if value is None else _read_text(value), lambda _: True, "a text or null")


def texts(*, may_be_empty: bool = False) -> Check:
    """A list of texts; a single text becomes a list of one."""
    if may_be_empty:
        return Check(
            lambda value: [] if value is None else _read_texts(value), lambda _: True, "a list of texts, none empty"
        )
    return Check(_read_texts, bool, "a text or a list of texts, none of them empty")


def rows() -> Check:
    """The rows of a data set: "batches", "first", a list of rows, or `{"per_source": n}`."""
    return Check(
        _read_rows,
        bool,
        "batches, first, a list of distinct rows (integers in [0, 2**31)), or {per_source: an integer >= 1}",
    )


def check_rows_exist(chosen: str | Sequence[int] | Mapping[str, int], num_rows: int, source: str) -> None:
    """Raises `ConfigError` for listed rows that lie beyond the `num_rows` of the data."""
    beyond = [row for row in chosen if row >= num_rows] if isinstance(chosen, list) else []
    if beyond:
        which = f"row{'s' if len(beyond) > 1 else ''} {', '.join(map(str, beyond[:10]))}"
        raise ConfigError(
            f"{source} must be rows of the validation data, which has {num_rows} rows (0 to {num_rows - 1}), "
            f"got {which}"
        )


def mapping_of_mappings(pattern: str, allowed_names: str) -> Check:
    """A mapping of names to mappings, and {} for null.

    Args:
        pattern: A regular expression for the outer names, which `allowed_names` says in words.
    """

    def read(value: object) -> dict[str, dict[str, Any]]:
        if value is not None and not isinstance(value, Mapping):
            raise ValueError
        result = {name: {} if inner is None else inner for name, inner in (value or {}).items()}
        if not all(isinstance(name, str) and re.fullmatch(pattern, name) for name in result):
            raise ValueError
        if not all(isinstance(inner, Mapping) for inner in result.values()):
            raise ValueError
        return {name: dict(inner) for name, inner in result.items()}

    return Check(read, lambda _: True, f"a mapping of names ({allowed_names}) to mappings")


def finite() -> Check:
    """Anything that JSON can hold, which NaN and infinity are not."""
    return Check(_read_anything, lambda _: True, "free of NaN and infinity, and of what JSON cannot hold")


def _read_boolean(value: object) -> bool:
    if isinstance(value, str) and value.strip().lower() in _BOOLEANS:
        return _BOOLEANS[value.strip().lower()]
    if not isinstance(value, bool):
        raise ValueError
    return value


def _read_integer(value: object) -> int:
    if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value.bit_length() > _MAX_BITS:
        raise ValueError
    return value


def _read_number(value: object) -> float:
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        raise ValueError
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError
    try:
        result = float(value)
    except OverflowError:  # an integer of more than 308 digits
        raise ValueError from None
    if not math.isfinite(result):
        raise ValueError
    return result


def _read_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value.strip()


def _read_texts(value: object) -> list[str]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(text, str) and text for text in listed):
        raise ValueError
    return listed


def _read_rows(value: object) -> str | list[int] | dict[str, int]:
    if isinstance(value, str):
        return value.strip().lower() if value.strip().lower() in ("batches", "first") else ""
    if isinstance(value, Mapping):
        num_each = _read_integer(value["per_source"]) if list(value) == ["per_source"] else 0
        return {"per_source": num_each} if num_each > 0 else {}
    listed = [_read_integer(row) for row in value] if isinstance(value, list) else []
    return listed if len(set(listed)) == len(listed) and all(0 <= row < 2**31 for row in listed) else []


def _read_anything(value: Any) -> Any:
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        _read_anything(item)
    if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
        raise ValueError
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError
    if not isinstance(value, str | int | float | list | Mapping | None):
        raise ValueError
    return value
