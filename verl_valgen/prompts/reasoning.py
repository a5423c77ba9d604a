"""Reasoning and answer: where the reasoning of an answer ends, by a model's chat template.

This module knows texts and templates, no tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_valgen.prompts.conversations import ChatTemplate

logger = logging.getLogger(__name__)

KNOWN_ENDS = (
    "</think>",  # Qwen, DeepSeek, GLM, and most others
    "[/THINK]",  # Mistral
    "<|channel|>final<|message|>",  # gpt-oss
    "<|END_THINKING|>",  # Cohere
    "</seed:think>",
    "</reasoning>",
)
"""The texts that end the reasoning of models whose template has them."""

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""The keys under which templates look for a message's reasoning."""


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning that a message has apart from its content, stripped; "" without any."""
    values = [message.get(key) for key in _REASONING_KEYS]
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")


def reasoning_end(template: ChatTemplate) -> str:
    """The text that ends the reasoning of an answer, as a template renders it between a turn's reasoning and its
    content; else the one of `KNOWN_ENDS` that stands in the template; "" where there is none."""
    reasoning, content = "qwzreasonqwz", "qwzcontentqwz"
    message: dict[str, Any] = {"role": "assistant", "content": content} | dict.fromkeys(_REASONING_KEYS, reasoning)
    try:
        text = template.render([{"role": "user", "content": "?"}, message])
    except Exception as e:  # of every kind: a template is a program
        logger.debug("the chat template does not render reasoning: %.300r", e)
        text = ""
    _, found, rest = text.partition(reasoning)
    between, has_content, _ = rest.partition(content)
    source = between if found and has_content else template.source
    known = [mark for mark in KNOWN_ENDS if mark in source]
    return known[0] if known else between.strip() if found and has_content else ""


def after_reasoning(text: str, end: str) -> str | None:
    """What follows the last `end` in `text`, without the white space between; None where there is no `end`."""
    _, found, answer = text.rpartition(end)
    return answer.lstrip() if found else None
