"""How single values are read, how they are shown in errors, and how mistakes are collected."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_valgen.settings import checks
from verl_valgen.settings.checks import ConfigError, Mistakes, plain, quoted


class Hostile:
    def __repr__(self) -> str:
        return "\x1b[2J\n\u202e" + "x" * 1000


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a", "'a'"),
        ("a\n\x1b", r"'a\n\x1b'"),
        ("\u202e\ud800é", r"'\u202e\ud800\xe9'"),
        ([0.5, None], "[0.5, None]"),
        (10**5000, "int that cannot be shown"),
        ("x" * 100, "'" + "x" * 76 + "..."),
        (Hostile(), r"\x1b[2J\n\u202e" + "x" * 62 + "..."),
    ],
    ids=lambda _: "",
)
def test_values_are_quoted_harmlessly(value, shown):
    assert quoted(value) == shown
    assert len(shown) <= 80


@given(st.text(), st.integers(3, 100))
def test_any_text_is_shown_in_printable_ascii(text, max_chars):
    shown = plain(text, max_chars)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= max_chars
    if text.isascii() and text.isprintable():
        assert shown == (text if len(text) <= max_chars else text[: max_chars - 3] + "...")


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        (checks.boolean(), " ON ", True),
        (checks.at_least(0), " +7 ", 7),
        (checks.share(), "1e-1", 0.1),
        (checks.one_of("a", "b", aliases={"c": "a"}), " C", "a"),
        (checks.name(), " FAST ", "fast"),
        (checks.auto_or(checks.at_least(1)), "AUTO", "auto"),
        (checks.auto_or(checks.at_least(1)), "3", 3),
        (checks.optional_text(), None, ""),
        (checks.texts(), "a", ["a"]),
        (checks.texts(may_be_empty=True), None, []),
        (checks.rows(), " First ", "first"),
        (checks.rows(), [3, "7"], [3, 7]),
        (checks.rows(), {"per_source": "2"}, {"per_source": 2}),
        (checks.finite(), {"a": [1, None]}, {"a": [1, None]}),
    ],
)
def test_values_are_read(check, value, expected):
    assert check(value, "here") == expected


OTHER_ROWS = [
    *("last", "", None, 3, True, [], [3, 3], [-1], [1.5], [True], [2**31], [[1]]),
    *({}, {"per_source": 0}, {"per_source": [1]}, {"per_sauce": 2}, {"per_source": 2, "first": 1}),
]


@pytest.mark.parametrize("value", OTHER_ROWS, ids=repr)
def test_other_rows_are_refused(value):
    with pytest.raises(ConfigError, match=r"here must be batches, first, a list of distinct rows .* >= 1\}, got "):
        checks.rows()(value, "here")


def test_mistakes_are_collected_line_by_line_and_once():
    mistakes = Mistakes()
    mistakes.raise_if_any()
    for text in ("a", "b\nc", "a"):
        with mistakes.noted():
            raise ConfigError(text)
    assert mistakes.lines == ["a", "b", "c"]
    with pytest.raises(ConfigError, match=r"^a\nb\nc$"):
        mistakes.raise_if_any()
    with pytest.raises(ZeroDivisionError), mistakes.noted():
        _ = 1 / 0


def test_the_settings_import_no_other_room():
    code = """
import sys
import verl_valgen.settings.load, verl_valgen.settings.table
print(sorted(name for name in sys.modules if name.startswith("verl_valgen") and ".settings" not in name))
print(sorted({"torch", "transformers", "verl", "wandb"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['verl_valgen']", "[]"]
