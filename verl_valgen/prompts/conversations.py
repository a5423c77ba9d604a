"""Which assistant turns of a conversation are answered anew, and what a message says. Pure functions on messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def answered_turns(messages: Sequence[Mapping[str, Any]], turn: str) -> list[int]:
    """Places of messages that are to be answered anew; without an assistant turn, the one behind the last.

    Args:
        turn: `generation.turn`: last, first, all.
    """
    turns = [i for i, message in enumerate(messages) if i > 0 and message["role"] == "assistant"]
    chosen = {"first": turns[:1], "last": turns[-1:], "all": turns}[turn]
    return chosen or [len(messages)]


def readable(content: Any) -> str:
    """The text of a message's content, be it a string or a list of parts such as `{"type": "text", "text": ...}`."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part.get("text") or "" for part in parts if isinstance(part, dict))
