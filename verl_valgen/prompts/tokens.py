"""Text to tokens and back, with nothing added and nothing tidied up: the one place where tokens become text.

It knows a tokenizer, and which tokens end an answer; it knows neither prompts nor templates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

REPLACEMENT = "\ufffd"
"""What a token that has no text is shown as, and what decoders give for bytes that are no UTF-8."""

_CONTEXT_LENGTHS = (8, 9, 10, 11)
"""Numbers of tokens before a text that it is decoded behind, so that one of them begins with a character: these have at
most four bytes, each of which may be a token."""


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of `text`, which a chat template has rendered: special tokens are in it already, so none are added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Decoder:
    """Tokens to text: prompts, answers and references alike.

    A token that the tokenizer does not know (embeddings are often padded beyond its vocabulary) becomes U+FFFD,
    whatever the tokenizer itself makes of it.

    Args:
        tokenizer: Its beginning, end and padding are left out of answers.
        end_ids: Tokens that are left out of answers, too: those that end one.
    """

    def __init__(self, tokenizer: Any, end_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        own = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
        self.left_out = frozenset(end_ids) | {token_id for token_id in own if isinstance(token_id, int)}
        self._has_text: dict[int, bool] = {}
        # Tokenizers without a backend in Rust put spaces around added tokens unless they are told not to.
        self._kwargs = {"spaces_between_special_tokens": False} if _is_slow(tokenizer) else {}

    def whole(self, token_ids: Sequence[int], behind: Sequence[int] = ()) -> str:
        """The text of all tokens, special ones too.

        Args:
            behind: The tokens before these. Alone, decoders of the SentencePiece kind would strip a leading space.
                A character whose bytes lie on both sides belongs to the text behind.
        """
        context = [token_id for token_id in behind[-_CONTEXT_LENGTHS[-1] :] if self.has_text(token_id)]
        pieces = []
        for has_text, group in groupby(token_ids, self.has_text):
            run = list(group)
            if has_text:
                pieces.append(self._added(context, run))
                context = [*context, *run][-_CONTEXT_LENGTHS[-1] :]
            else:
                pieces.append(REPLACEMENT * len(run))
        return "".join(pieces)

    def answer(self, token_ids: Sequence[int], behind: Sequence[int] = ()) -> str:
        """The text of an answer: without beginnings, ends and padding. Other special tokens stay, as markers of tool
        calls and channels do.

        Args:
            behind: The tokens of the prompt; see `whole`.
        """
        return self.whole([token_id for token_id in token_ids if token_id not in self.left_out], behind)

    def readable(self, token_ids: Sequence[int]) -> str:
        """The text for a person to read: without special tokens."""
        return self._decode([i for i in token_ids if self.has_text(i)], skip_special_tokens=True)

    def has_text(self, token_id: int) -> bool:
        """Whether the tokenizer knows a token."""
        known = self._has_text.get(token_id)
        if known is None:
            try:
                known = self.tokenizer.convert_ids_to_tokens(token_id) is not None
            except Exception:  # of every kind, where there is no such token
                known = False
            self._has_text[token_id] = known
        return known

    def _added(self, context: Sequence[int], token_ids: list[int]) -> str:
        """The text that tokens add to that of the tokens before them; all of them are known."""
        # Bytes that begin amid a character would spoil all that follow.
        tails = [context[-length:] for length in _CONTEXT_LENGTHS]
        tail = next((tail for tail in tails if not self._decode(tail).startswith(REPLACEMENT)), tails[0])
        before, text = self._decode(tail), self._decode([*tail, *token_ids])
        if text.startswith(before):
            return text[len(before) :]
        if before.endswith(REPLACEMENT):  # it ends amid a character, which is complete now
            return text[_common_length(before, text) :]
        return self._decode(token_ids)  # what is added spoils what was there: a run of bytes that has no end

    def _decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The tokenizer's own text of tokens that it knows; should it refuse some all the same, U+FFFD for those."""
        if not token_ids:
            return ""
        try:
            return self.tokenizer.decode(
                token_ids,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,  # spaces before punctuation marks stay
                **self._kwargs,
            )
        except Exception:
            if len(token_ids) == 1:
                return REPLACEMENT
            return "".join(self._decode([i], skip_special_tokens=skip_special_tokens) for i in token_ids)


def _common_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _is_slow(tokenizer: Any) -> bool:
    return getattr(tokenizer, "is_fast", None) is False
