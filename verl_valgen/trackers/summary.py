"""A round's numbers as lines for people: a table strategy by number, within a width.

Pure functions; the lines have no control characters. Each row of a table begins with `|`, so that no name can be taken
for a line of another kind.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

from verl_valgen.records import BestValue, GroupNumbers, RoundNumbers
from verl_valgen.text import printable
from verl_valgen.viewing.wording import number

_MAX_NAME_CHARS = 64
"""Longer names of numbers are cut; those of strategies are not longer where they are configured."""

_FRAME_CHARS = 3
"""What a cell takes beside its text, and one more for a table as a whole: `| text | text |`."""


def summary(numbers: RoundNumbers, step: int, max_chars: int, best_metric: str | None = None) -> list[str]:
    """The lines that sum a round up, of `max_chars` at most where the terminal has room for a number at all.

    Args:
        best_metric: What `numbers.best` is of.
    """
    samples = "sample" if numbers.num_samples == 1 else "samples"
    lines = [
        f"Step {step}: {number(numbers.num_samples)} {samples} in {number(numbers.seconds)} s, "
        f"{number(numbers.tokens_per_s)} tokens/s"
    ]
    groups = {name: _of(group) for name, group in numbers.by_strategy.items()} or {"": _of(numbers.overall)}
    lines += _table(groups, max_chars)
    if numbers.best is not None:
        lines.append(_best(best_metric or "", numbers.best))
    return lines


def _best(metric: str, best: BestValue) -> str:
    shown = printable(metric, 2 * _MAX_NAME_CHARS)
    # The name begins the line: quoted where it could be read as something else.
    shown = shown if re.fullmatch(r"[\w./@-]*\w[\w./@-]*", shown) else repr(shown)
    return f"{shown}: best {number(best.value)} at step {number(best.step)}"


def _of(group: GroupNumbers) -> dict[str, float]:
    return {**group.scores, **group.always, **group.derived}


def _table(groups: Mapping[str, Mapping[str, float]], max_chars: int) -> list[str]:
    """Rows of groups, by name, with columns of numbers; those that do not fit beside the others in further tables."""
    from rich.cells import cell_len  # imported with the first table, on the console's own thread

    columns = list(dict.fromkeys(name for values in groups.values() for name in values))
    header = [_name(name, max_chars) for name in ("strategy", *columns)]
    rows = [
        [_name(name, max_chars), *(number(values[column]) if column in values else "" for column in columns)]
        for name, values in groups.items()
    ]
    widths = [max(map(cell_len, cells)) + _FRAME_CHARS for cells in zip(header, *rows, strict=True)]
    names = [0] if any(groups) else []
    room = max_chars - 1 - (widths[0] if names else 0)
    lines: list[str] = []
    if names and max(widths[1:], default=0) > room:  # then each group has its name in a line, and tables of its own
        for (_, values), (name, *_) in zip(groups.items(), rows, strict=True):
            lines += [f"| {name}", *_table({"": values}, max_chars)]
        return lines
    for chosen in _split(widths, room):
        cells = [[row[i] for i in (*names, *chosen)] for row in (header, *rows)]
        lines += _drawn(cells, num_left=len(names))
    return lines


def _name(text: str, max_chars: int) -> str:
    """A name, cut where it is longer than a line."""
    from rich.cells import cell_len  # a letter of CJK takes two columns

    limit = max(8, min(_MAX_NAME_CHARS, max_chars - _FRAME_CHARS - 1))
    shown = printable(text, limit)
    while cell_len(shown) > limit:
        shown = shown[:-4] + "..."
    return shown


def _split(widths: Sequence[int], room: int) -> list[list[int]]:
    """The columns of each table, by their places; 0 is that of the names."""
    tables: list[list[int]] = []
    left = 0
    for i, needed in enumerate(widths[1:], start=1):
        if not tables or needed > left:
            tables.append([])
            left = room
        tables[-1].append(i)
        left -= needed
    return tables


def _drawn(cells: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """The lines of a table, whose first row is the header, and of whose columns `num_left` are texts."""
    from rich.box import MARKDOWN  # letters that every terminal has
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=MARKDOWN)
    for i, name in enumerate(cells[0]):
        table.add_column(Text(name), justify="left" if i < num_left else "right", no_wrap=True)
    for row in cells[1:]:
        table.add_row(*map(Text, row))  # `Text`: nothing in it is markup
    # As wide as it has to be: its columns were chosen to fit.
    console = Console(file=io.StringIO(), width=10_000, color_system=None, legacy_windows=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]
