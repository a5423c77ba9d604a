"""Payloads as JavaScript: one call each, whose argument is JSON (but for one key) that no text can break out of."""

from __future__ import annotations

import json
from typing import Any

# In a script, though not in JSON, the left of each pair would set what the object inherits from; the right is a key
# like any other. Within a text a backslash stands before a quotation mark: neither can be part of one.
_KEYS = tuple((start + b'"__proto__":', start + b'["__proto__"]:') for start in (b"{", b","))


def call(function: str, payload: Any) -> bytes:
    """A script that calls `function` with a payload."""
    content = to_json(payload)
    for key, computed in _KEYS:
        content = content.replace(key, computed)
    return b"%b(%b);\n" % (function.encode("ascii"), content)


def argument(function: str, script: bytes) -> Any:
    """What `call` was given. Raises `ValueError` where the script is something else."""
    content = script.removeprefix(f"{function}(".encode("ascii")).removesuffix(b");\n")
    for key, computed in _KEYS:
        content = content.replace(computed, key)
    return json.loads(content)


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
