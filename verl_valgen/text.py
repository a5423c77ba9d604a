"""Text that nobody vouches for: what a model says, what a data set holds, what an exception quotes.

This module owns how such text is cut, shown, stored and logged; it does not know where the text comes from. The
functions are pure, except that those which describe an error look for secrets in the environment.
"""

from __future__ import annotations

import logging
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


# How much memory there was, and where an object lay, differs from one occurrence to the next.
_INCIDENTAL = re.compile(r"0x[0-9a-fA-F]+|[\d.]+(?= ?(?:[KMGT]i?B|bytes)\b)")


class OnceLogger:
    """Warns of each cause once; when it recurs, the message goes to DEBUG.

    Causes that differ only in amounts of memory or in addresses are the same.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self._causes: set[object] = set()

    def warn(self, message: str, cause: object = None) -> None:
        """Logs a message that is printable already. Without `cause` the message itself is the cause."""
        cause = message if cause is None else cause
        if isinstance(cause, str):
            cause = _INCIDENTAL.sub("#", cause)
        self.logger.log(logging.DEBUG if cause in self._causes else logging.WARNING, "%s", message)
        self._causes.add(cause)

    def warn_of_error(self, problem: str, error: BaseException, *remarks: str) -> None:
        """Logs `problem: error; remark; ...`, whose cause is the error; and always the traceback, at DEBUG."""
        cause = describe(error)
        self.warn("; ".join([f"{problem}: {cause}", *remarks]), cause)
        if self.logger.isEnabledFor(logging.DEBUG):
            self.logger.debug("%s\n%s", problem, describe_at_length(error))


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
    """Type and message of `error` in one printable line without secrets, even if its message cannot be made.

    An exception that stands for one of another process has that one's line in `one_line`.
    """
    text = getattr(error, "one_line", None) or "".join(traceback.format_exception_only(error)).strip()
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
