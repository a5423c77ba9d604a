"""Text that nobody has vouched for: what a model says, what a data set holds, what an exception quotes.

This module owns cutting, showing and storing such text. None of it knows where the text goes; all functions are pure,
but that what describes an error looks for secrets in the environment.
"""

from __future__ import annotations

import os
import re
import traceback
import unicodedata

_ELLIPSIS = "..."
_MAX_REASON_CHARS = 300

# Control, format (bidi overrides, zero-width characters), surrogate, line and paragraph separator.
_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

# Lone surrogates cannot be encoded as UTF-8. NUL is refused by PostgreSQL, on which tracking servers run.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

# `user:password@` of an address: errors of HTTP clients quote addresses whole.
_CREDENTIALS = re.compile(r"(?<=://)[^\s/?#'\"]+@")

_SECRET_VARIABLES = ("_KEY", "_TOKEN", "_PASSWORD", "_SECRET", "_CONNECTION_STRING")
_MIN_SECRET_CHARS = 8  # a shorter value may well be an ordinary word


def truncate(text: str, max_chars: int) -> str:
    """At most `max_chars` characters of `text`; a cut text ends in `...`, which is counted."""
    if len(text) <= max_chars:
        return text
    return text[: max(0, max_chars - len(_ELLIPSIS))] + _ELLIPSIS[:max_chars]


def printable(text: str, max_chars: int | None = None) -> str:
    r"""`text` for one line of a terminal: a newline becomes `\n`, ESC `\x1b`, a bidi override `\u202e`, and so on.

    Accents, CJK and emoji stay. With `max_chars` the result is that long at most, as `truncate` would have it, but is
    cut between escapes, never inside one. A backslash in `text` stays as it is: the result is to be read, not parsed.
    """
    # Every character yields at least one: what lies beyond `max_chars` cannot be shown, so it is not looked at.
    head = text if max_chars is None else text[: max_chars + 1]
    pieces = [_visible(char) for char in head]
    if max_chars is None or sum(map(len, pieces)) <= max_chars:
        return "".join(pieces)
    num_left = max_chars - len(_ELLIPSIS)
    kept = []
    for piece in pieces:
        num_left -= len(piece)
        if num_left < 0:
            break
        kept.append(piece)
    return "".join(kept) + _ELLIPSIS[:max_chars]


def storable(text: str) -> str:
    """`text` with every lone surrogate and NUL replaced by U+FFFD, so that every tracker takes it; of equal length."""
    return _UNSTORABLE.sub("\ufffd", text)


def describe(error: BaseException) -> str:
    """Type and message of `error` in one printable line without secrets, even if its message cannot be made."""
    text = "".join(traceback.format_exception_only(error)).strip()
    return printable(_without_secrets(text), _MAX_REASON_CHARS)


def as_exception(error: BaseException) -> Exception:
    """`error`, or a description of one that would end the program: an exit, or a panic of what is written in Rust."""
    return error if isinstance(error, Exception) else RuntimeError(describe(error))


def describe_at_length(error: BaseException) -> str:
    """The traceback of `error` without secrets, printable line by line."""
    text = "".join(traceback.format_exception(error))
    return "\n".join(printable(line) for line in _without_secrets(text).split("\n"))


def _without_secrets(text: str) -> str:
    """`text` with `***` for credentials in addresses, and for the values of variables that are named like secrets."""
    values = {value.strip() for name, value in os.environ.items() if name.upper().endswith(_SECRET_VARIABLES)}
    for value in sorted(values, key=len, reverse=True):  # one may be a part of another
        if len(value) >= _MIN_SECRET_CHARS:
            text = text.replace(value, "***")
    return _CREDENTIALS.sub("***@", text)


def _visible(char: str) -> str:
    if unicodedata.category(char) in _INVISIBLE_CATEGORIES:
        return char.encode("unicode_escape").decode("ascii")
    return char
