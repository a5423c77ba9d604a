"""The table of keys: what the documentation shows is what is declared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from verl_valgen.settings.settings import SETTINGS
from verl_valgen.settings.table import BEGIN, END, main, table, with_table

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_every_key_has_a_row_of_four_cells():
    _, _, *rows, others = table().splitlines()
    assert [row.split(" | ")[0] for row in rows] == [f"| `{key}`" for key in SETTINGS]
    assert {row.count(" | ") for row in [*rows, others]} == {3}
    assert "| `generation.top_k` | 50 | `VERL_GENERATION_TOP_K` | " in table()
    assert "| `generation.strategies` | null | - | " in table()
    assert "| `generation.compile` | false | - | " in table()
    assert "| `generation.turn` | last | - | " in table()


def test_the_documentation_has_the_table():
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, f"python -m verl_valgen.settings.table {PAGE.relative_to(PAGE.parents[1])}"


def test_a_table_of_yesterday_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}yesterday\n{END}after\n")
    main(str(page))
    assert page.read_text() == f"before\n{BEGIN}{table()}{END}after\n"
    with pytest.raises(ValueError, match="must have the lines <!-- keys: begin -->"):
        with_table("no markers")


def test_without_a_file_it_is_printed():
    command = [sys.executable, "-m", "verl_valgen.settings.table"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == table()
