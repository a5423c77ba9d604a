"""Tokens are text again."""

from __future__ import annotations

from assets import PRINTABLE

from verl_valgen.prompts.tokens import Decoder


def test_assets_tokenizer_gives_back_the_text(tokenizer):
    text = PRINTABLE + " a , b . isn't\n\n  x"
    assert Decoder(tokenizer).whole(tokenizer(text)["input_ids"]) == text
