"""Finds where the rows of a validation data set lie in its files.

verl reads its files into one table, and `data.val_max_samples` keeps a part of it, with `data.shuffle` and no seed
another one in every run. What stays is each row's label in pandas' index. Labels begin anew with each file and need not
be unique, so that where one leaves a choice the row itself is looked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from verl_valgen.prompts.columns import cell_value
from verl_valgen.text import describe

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a row lies."""

    file: str | None
    """Its file, where there are several."""
    row: int
    """Its row in the file, from 0; where that is not known, in the data set."""
    number: int
    """Its row counted over all files: unique."""


def places(dataset: Any, rows: Iterable[int]) -> list[Place]:
    """The places of rows of a data set; those in the data set itself where it has no files, or they do not tell.

    Opens the files, and reads of them at most the row groups of these rows.
    """
    rows = list(rows)
    try:
        found = _in_files(dataset, rows)
    except Exception as e:  # a file that is no more, a data set of somebody's own
        logger.debug("in which rows of the files the validation data lies is not known: %s", describe(e))
        found = None
    return [Place(None, row, row) for row in rows] if found is None else found


def num_rows_in_files(dataset: Any) -> int:
    """Rows of all files of a data set; those of the data set itself where it has none, or they cannot be read."""
    try:
        return sum(len(file.labels) for file in _files_of(dataset)) or len(dataset)
    except Exception as e:
        logger.debug("how many rows the files of the validation data have is not known: %s", describe(e))
        return len(dataset)


class _File:
    """A parquet file, with what pandas made of its rows."""

    def __init__(self, path: str, offset: int) -> None:
        import pyarrow.parquet as pq  # verl's own dependency

        self.path, self.offset = path, offset
        self._parquet = pq.ParquetFile(path)
        self._group: tuple[int, Any] = (-1, None)
        num_rows = self._parquet.metadata.num_rows
        index = (self._parquet.schema_arrow.pandas_metadata or {}).get("index_columns", [])
        self.index_columns = {name for name in index if isinstance(name, str)}
        self.labels: Sequence[Any] = range(num_rows)
        if self.index_columns:
            columns = self._parquet.read(columns=index).to_pydict()
            self.labels = columns[index[0]] if len(index) == 1 else list(zip(*columns.values(), strict=True))
        elif index and len(labels := range(index[0]["start"], index[0]["stop"], index[0]["step"])) == num_rows:
            self.labels = labels
        self._by_label: dict[Any, list[int]] = {}
        if not isinstance(self.labels, range):
            for row, label in enumerate(self.labels):
                self._by_label.setdefault(label, []).append(row)

    def rows_labelled(self, label: Any) -> list[int]:
        if isinstance(self.labels, range):
            return [self.labels.index(label)] if label in self.labels else []
        return self._by_label.get(label, [])

    def holds(self, row: int, columns: Mapping[str, Any]) -> bool:
        """Whether a row of the file is a row of the data set, of which these are the columns."""
        first = 0
        for group in range(self._parquet.num_row_groups):
            num_rows = self._parquet.metadata.row_group(group).num_rows
            if row < first + num_rows:
                break
            first += num_rows
        if self._group[0] != group:
            self._group = group, self._parquet.read_row_group(group)
        (own,) = self._group[1].slice(row - first, 1).to_pylist()
        return all(
            name in columns and cell_value(columns[name]) == cell_value(value)
            for name, value in own.items()
            if name not in self.index_columns
        )


def _files_of(dataset: Any) -> list[_File]:
    files: list[_File] = []
    for path in getattr(dataset, "parquet_files", None) or []:
        files.append(_File(str(path), files[-1].offset + len(files[-1].labels) if files else 0))
    return files


def _in_files(dataset: Any, rows: Sequence[int]) -> list[Place] | None:
    """The places in files, None where there are none, or a row is in none of them."""
    frame: Any = getattr(dataset, "dataframe", None)
    if not hasattr(frame, "iloc") or not (files := _files_of(dataset)):
        return None
    labels = list(frame.index)
    is_whole = len(labels) == files[-1].offset + len(files[-1].labels)
    # A class of somebody's own may give its rows new labels.
    keeps_labels = type(dataset).__module__.startswith("verl.")
    found: dict[int, Place] = {}
    taken: set[int] = set()
    for row in dict.fromkeys(rows):
        if is_whole:
            file = max((file for file in files if file.offset <= row), key=lambda file: file.offset)
            if file.labels[row - file.offset] == labels[row]:
                found[row] = _place(file, row - file.offset, files)
                taken.add(row)
                continue
        candidates = [(file, in_file) for file in files for in_file in file.rows_labelled(labels[row])]
        if len(candidates) != 1 or not keeps_labels:
            columns = frame.iloc[row].to_dict()
            candidates = [
                (file, in_file)
                for file, in_file in candidates
                if file.offset + in_file not in taken and file.holds(in_file, columns)
            ]
        if not candidates:
            return None
        found[row] = _place(*candidates[0], files)
        taken.add(found[row].number)
    return [found[row] for row in rows]


def _place(file: _File, row: int, files: Sequence[_File]) -> Place:
    return Place(file.path if len(files) > 1 else None, row, file.offset + row)
