"""One WandB table in which answers can be followed over the steps of a run.

WandB's incremental tables store each row once, but each increment's record names all increments before it, and only the
last 100 are shown: 500 rounds of 8 samples took 51 MB of records beside 9 MB of rows. So the table is begun anew after
so many rounds, with earlier ones as its first increment, which are thinned out: size and time of a round stay the same
however long the run, and the table shows all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from verl_valgen.records import Sample
from verl_valgen.text import truncate
from verl_valgen.trackers.table import Cell, build_table, first_answers

_MAX_PROMPTS = 20
_MAX_CHARS = {"prompt_text": 200, "generation": 500, "reference": 500}
"""What a round adds at most; `val/samples` has all of it."""

_MAX_INCREMENTS = 50
"""Rounds after which the table is begun anew, and earlier rounds that are kept then."""

_COLUMNS = ("step", "index", "prompt_text", "generation", "reference")

_NOT_SCORES = build_table([], 0)[0]

_Rows = list[dict[str, Cell]]


class TableOverSteps:
    """The first answers of each prompt, by steps; nothing where the installed WandB has no incremental tables.

    Args:
        new_table: `wandb.Table`.
    """

    def __init__(self, new_table: Callable[..., Any], max_chars: int, strategy: str) -> None:
        self._new_table = new_table
        self._max_chars, self._strategy = max_chars, strategy
        self._rounds: list[_Rows] = []
        """The rows of the rounds that the table has, in the order in which they came."""
        self._num_increments = 0
        self._columns = list(_COLUMNS)
        self._table: Any = None
        try:
            self._begin()
            self._is_possible = True
        except (TypeError, AssertionError):  # before 0.20: no `log_mode`, or none of that name
            self._is_possible = False

    def add(self, samples: Sequence[Sample]) -> Any:
        """The table with the round of these samples, to be logged before the next is added; None: there is none."""
        if not (self._is_possible and samples):
            return None
        columns, cells = build_table(first_answers(samples, self._strategy)[:_MAX_PROMPTS], self._max_chars)
        rows = [{column: _cut(column, cell) for column, cell in zip(columns, row, strict=True)} for row in cells]
        new_scores = [column for column in columns if column not in (*_NOT_SCORES, *self._columns)]
        self._rounds.append(rows)
        if new_scores or self._num_increments >= _MAX_INCREMENTS:
            self._columns += new_scores  # columns are fixed once a table has rows
            self._rounds = thinned(self._rounds, _MAX_INCREMENTS)
            self._begin()
            rows = [row for round in self._rounds for row in round]
        for row in rows:
            self._table.add_data(*(row.get(column) for column in self._columns))
        self._num_increments += 1
        return self._table

    def _begin(self) -> None:
        self._table = self._new_table(columns=list(self._columns), log_mode="INCREMENTAL")
        self._num_increments = 0


def _cut(column: str, cell: Cell) -> Cell:
    return truncate(cell, _MAX_CHARS[column]) if column in _MAX_CHARS and isinstance(cell, str) else cell


def thinned(rounds: Sequence[_Rows], num_kept: int) -> list[_Rows]:
    """At most `num_kept` of the rounds, evenly spread, first and last among them."""
    if len(rounds) <= num_kept:
        return list(rounds)
    last = len(rounds) - 1
    return [rounds[i * last // (num_kept - 1)] for i in range(num_kept)]
