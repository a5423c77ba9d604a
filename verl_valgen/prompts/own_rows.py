"""Checks the columns of a row of a user's own prompts, by the names and the types that they may have.

A row is a mapping without empty cells; what is wrong with it is said by `ValueError`. This module knows neither files
nor tokenizers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from verl_valgen.settings.checks import quoted

_NAMES_OF_PROMPTS = ("prompt", "messages")


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation to answer: not empty, each message with a role and a content, which is text or null."""
    if not any(name in row for name in _NAMES_OF_PROMPTS):
        _refuse_misspelt(list(row))
    prompt = row.get("messages") if row.get("prompt") is None else row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt.strip() else prompt
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f"`prompt` or `messages` must be a text or a list of messages of text, got {quoted(prompt)}")
    # In a table a content that is missing is null, and to a template the two are not the same.
    return [{"content": None, **message} for message in messages]


def _refuse_misspelt(names: Sequence[str]) -> None:
    """Raises ValueError for the name that is closest to `prompt` or `messages`, if one is close."""
    by_spelling = {str(name)[:60].lower(): str(name)[:60] for name in names}
    for wanted in _NAMES_OF_PROMPTS:
        for close in difflib.get_close_matches(wanted, by_spelling, n=1, cutoff=0.7):
            raise ValueError(f"`{by_spelling[close]}` is unknown (did you mean `{wanted}`?)")


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content)
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def reference_of(row: Mapping[str, Any]) -> str | None:
    """The expected answer, stripped; None if there is none."""
    reference = row.get("reference")
    if isinstance(reference, int | float) and not isinstance(reference, bool):
        reference = str(reference)
    if reference is not None and not isinstance(reference, str):
        raise ValueError(f"`reference` must be a text or a number, got {quoted(reference)}")
    return None if reference is None else reference.strip()


def tools_of(row: Mapping[str, Any]) -> list[Any]:
    """The tools that a conversation may call, [] without any."""
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"`tools` must be a list of mappings, got {quoted(tools)}")
    return tools
