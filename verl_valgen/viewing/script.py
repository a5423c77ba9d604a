"""Payloads as JavaScript: one call each, whose argument is JSON that nothing in a text can break out of."""

from __future__ import annotations

import json
from typing import Any


def call(function: str, payload: Any) -> bytes:
    """A script that calls `function` with a payload."""
    return b"%b(%b);\n" % (function.encode("ascii"), to_json(payload))


def argument(function: str, script: bytes) -> Any:
    """What `call` was given. Raises `ValueError` where the script is something else."""
    return json.loads(script.removeprefix(f"{function}(".encode("ascii")).removesuffix(b");\n"))


def to_json(payload: Any) -> bytes:
    """Compact JSON that may stand in a script, within HTML too; lone surrogates become U+FFFD."""
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # In JSON these characters stand in texts alone. `<` begins all that could end a script or change how it is read.
    for character, escape in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(character, escape)
    return encoded(text)


def encoded(text: str) -> bytes:
    """UTF-8, lone surrogates replaced. Two that belong together become one character, as a JSON parser has it."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
