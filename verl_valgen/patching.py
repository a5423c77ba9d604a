"""One way to put something in an attribute's place for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


@contextmanager
def patched(target: Any, name: str, value: Any) -> Iterator[None]:
    """Sets `target.name` to `value` and puts the old value, or the lack of one, back at the end, whatever happens."""
    original = getattr(target, name, _ABSENT)
    setattr(target, name, value)
    try:
        yield
    finally:
        if original is _ABSENT:
            delattr(target, name)
        else:
            setattr(target, name, original)
