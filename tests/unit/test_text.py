"""Hostile text becomes harmless, and no more of it is changed than has to be."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_valgen.text import describe, describe_at_length, printable, storable, truncate

# `st.text` leaves out surrogates unless told otherwise.
ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(ANY_TEXT, st.integers(min_value=1, max_value=30))
def test_truncate_bounds_the_length_and_keeps_what_fits(text, max_chars):
    cut = truncate(text, max_chars)
    assert len(cut) <= max_chars
    if len(text) <= max_chars:
        assert cut == text
    else:
        assert cut.endswith("..."[:max_chars])
        assert text.startswith(cut[: max(0, max_chars - 3)])


def test_truncate_counts_the_dots():
    assert truncate("abcdefgh", 7) == "abcd..."
    assert truncate("abcdefg", 7) == "abcdefg"


@given(ANY_TEXT)
def test_printable_leaves_nothing_that_steers_a_terminal(text):
    shown = printable(text)
    assert not [char for char in shown if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")


@given(ANY_TEXT, st.integers(min_value=1, max_value=30))
def test_printable_is_bounded_and_cuts_no_escape(text, max_chars):
    shown = printable(text, max_chars)
    assert len(shown) <= max_chars
    whole = printable(text)
    if len(whole) <= max_chars:
        assert shown == whole
        return
    assert shown.endswith("..."[:max_chars])
    kept = shown[: max(0, len(shown) - 3)]
    assert kept in {"".join(map(printable, text[:n])) for n in range(max_chars + 1)}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("a\tb", r"a\tb"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\x7f\x9b", r"\x7f\x9b"),
        ("\u202eevil\u2066\u200f", r"\u202eevil\u2066\u200f"),
        ("\u200b\ufeff\u2028\u2029", r"\u200b\ufeff\u2028\u2029"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_printable_shows_what_would_not_be_seen(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["", "naïve café", "日本語\u3000テキスト", "😀👍🏽", "\u00a0", "[bold]<b>\\nabla"])
def test_printable_keeps_ordinary_text(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("max_chars", "shown"), [(9, r"ab\x1bcde"), (8, "ab..."), (7, "ab..."), (5, "ab..."), (4, "a...")]
)
def test_printable_cuts_between_escapes(max_chars, shown):
    assert printable("ab\x1bcde", max_chars) == shown


@given(ANY_TEXT)
def test_storable_is_utf8_of_the_same_length(text):
    stored = storable(text)
    stored.encode("utf-8")
    assert len(stored) == len(text)
    assert all(new == old or new == "\ufffd" for new, old in zip(stored, text, strict=True))


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00")))
def test_storable_keeps_text_that_can_be_stored(text):
    assert storable(text) == text


def test_storable_replaces_nul_and_lone_surrogates():
    assert storable("a\x00b\ud83d!\udc00") == "a\ufffdb\ufffd!\ufffd"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://user:pass word", "at http://user:pass word"),
        ("at https://user:p%40ss@host:5000/api?x=1: no", "at https://***@host:5000/api?x=1: no"),
        ("at https://token@host", "at https://***@host"),
        ("at postgresql://user:p@ss@host/db", "at postgresql://***@host/db"),
        ("'http://host/a' and 'http://me@host/a'", "'http://host/a' and 'http://***@host/a'"),
        ("http://host/@me, me@host, //me@host", "http://host/@me, me@host, //me@host"),
        ("key planted-key-1, twice planted-key-1", "key ***, twice ***"),
        ("key planted-key-12", "key ***"),
        ("the word secret", "the word secret"),
        ("of another name: public-value", "of another name: public-value"),
    ],
)
def test_errors_are_described_without_secrets(monkeypatch, text, shown):
    monkeypatch.setenv("ONE_API_KEY", "planted-key-1")
    monkeypatch.setenv("another_token", "planted-key-12\n")
    monkeypatch.setenv("SHORT_PASSWORD", "secret")
    monkeypatch.setenv("SOMETHING", "public-value")
    error = ValueError(text)
    assert describe(error) == f"ValueError: {shown}"
    assert describe_at_length(error) == f"ValueError: {shown}\n"


def test_a_secret_is_hidden_before_a_long_message_is_cut(monkeypatch):
    monkeypatch.setenv("ONE_API_KEY", "planted-key-1")
    error = ValueError("x" * 275 + " planted-key-1 and more that is cut off")
    assert "planted" not in describe(error)
