"""Which assistant turns of a conversation are answered anew. Pure functions on messages."""

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
