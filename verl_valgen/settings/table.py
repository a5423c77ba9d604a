"""The table of keys for the documentation, in Markdown: `python -m verl_valgen.settings.table`.

With files as arguments, writes it into each, between `<!-- keys: begin -->` and `<!-- keys: end -->`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from verl_valgen.settings.settings import SETTINGS

BEGIN, END = "<!-- keys: begin -->\n", "<!-- keys: end -->\n"


def table() -> str:
    """Key, default, variable and meaning, one line for each key."""
    lines = ["| key | default | variable | meaning |", "|---|---|---|---|"]
    for key, setting in SETTINGS.items():
        variable = f"`{setting.variable}`" if setting.variable else "-"
        lines.append(f"| `{key}` | {_yaml(setting.default)} | {variable} | {setting.meaning} |")
    others = "any other field of `transformers.GenerationConfig`: `min_p`, `repetition_penalty`, `stop_strings`, ..."
    lines.append(f"| `+generation.<field>` | not set | - | {others} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the table of today. Raises `ValueError` where a marker is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page must have the lines {BEGIN.strip()} and {END.strip()}")
    return before + begin + table() + end + after


def _yaml(default: Any) -> str:
    """A default as the configuration has it."""
    if default is MISSING:
        return "depends"
    if default in ("", {}):
        return "null"
    return default if isinstance(default, str) else json.dumps(default)


def main(*paths: str) -> None:
    for path in map(Path, paths):
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
    if not paths:
        print(table(), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
