"""Text to tokens and back, with nothing added and nothing tidied up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of `text`, which a chat template has rendered: special tokens are in it already, so none are added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer: Any, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text of `token_ids` as it is: spaces before punctuation marks stay."""
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
