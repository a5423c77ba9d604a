"""Which words of a text are new against another one."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|\s+|[^\w\s]+")
"""A word, the space between two, punctuation; a character of scripts that put no space between words."""

_MAX_COMPARISONS = 4_000_000
"""Comparing takes at worst as many steps as one text has words times those of the other."""


def marked_words(text: str, before: str) -> list[tuple[str, bool]]:
    """`text` in pieces, each with whether it is new against `before`. Spaces alone are never new."""
    words, old = _WORD.findall(text), _WORD.findall(before)
    if len(words) * len(old) > _MAX_COMPARISONS:
        return [(text, text != before)]
    pieces: list[tuple[str, bool]] = []
    for kind, _, _, start, end in SequenceMatcher(None, old, words, autojunk=False).get_opcodes():
        piece = "".join(words[start:end])
        if piece:
            pieces.append((piece, kind != "equal" and not piece.isspace()))
    return pieces
