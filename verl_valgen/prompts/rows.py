"""Chooses the rows of the validation data that are asked (`generation.rows`), other than those of verl's batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from verl_valgen.prompts.columns import row_data
from verl_valgen.prompts.places import num_rows_in_files, places
from verl_valgen.settings.checks import ConfigError, check_rows_exist

KEY = "generation.rows"


def chosen_rows(dataset: Any, choice: str | Sequence[int] | Mapping[str, int], limit: int) -> list[int]:
    """Rows of a data set, by their places in it; those that are listed in the order of the list.

    Args:
        choice: `first`, the rows that the files have under these numbers, or `{"per_source": n}`.
        limit: The most rows, where they are the first.

    Raises:
        ConfigError: There is no such row, or no column `data_source`.
    """
    if isinstance(choice, Mapping):
        return _first_of_sources(dataset, choice["per_source"])
    return list(range(min(limit, len(dataset)))) if isinstance(choice, str) else _listed(dataset, choice)


def _listed(dataset: Any, rows: Sequence[int]) -> list[int]:
    num_rows = num_rows_in_files(dataset)
    check_rows_exist(rows, num_rows, KEY)
    in_dataset = {place.number: row for row, place in enumerate(places(dataset, range(len(dataset))))}
    for row in rows:
        if row not in in_dataset:
            raise ConfigError(
                f"{KEY}: row {row} is not among the {len(dataset)} of {num_rows} rows that the data set has kept "
                "(data.val_max_samples)"
            )
    return [in_dataset[row] for row in rows]


def _first_of_sources(dataset: Any, num_each: int) -> list[int]:
    frame = getattr(dataset, "dataframe", None)
    if frame is None or "data_source" not in frame:
        raise ConfigError(f"{KEY}: per_source needs a column data_source, which the validation data does not have")
    counts: Counter[str | None] = Counter()
    chosen = []
    for row, value in enumerate(frame["data_source"]):
        source = row_data({"data_source": value}, "").data_source
        counts[source] += 1
        if counts[source] <= num_each:
            chosen.append(row)
    return chosen
