"""Keeps the first step file of a folder such that all of them can be loaded together.

`datasets.load_dataset("json", data_files="step_*.jsonl")` takes the columns and their types from the first file alone,
and refuses a later one that has more: a score that appears later, a reference where there was none. Its type `Json`,
which holds anything, it takes for mappings that are empty or have different keys. So where a round has what the first
file has no type for, the first file is written again, with what has no value there spelt in another way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Path = tuple[str, ...]
"""The name of a column, or that of a column of mappings and one of their keys."""

Types = dict[Path, set[str]]
"""The types of the values that are not null."""

Record = dict[str, Any]


def types_in(records: Iterable[Mapping[str, Any]]) -> Types:
    """The types in records, for each column and for each key of its mappings."""
    types: Types = {}
    for record in records:
        for name, value in record.items():
            types.setdefault((name,), set()).update(_type(value))
            for key, item in value.items() if isinstance(value, dict) else ():
                types.setdefault((name, key), set()).update(_type(item))
    return types


def missing_types(first: Types, later: Types) -> Types:
    """What the first file has no type for."""
    return {
        path: types
        for path, types in later.items()
        if path not in first or any(not _is_covered(one, first[path]) for one in types)
    }


def with_types(records: Iterable[Mapping[str, Any]], missing: Types) -> list[Record]:
    """The records of the first file with room for types that are missing.

    Where a column has no value at all, null becomes an empty text (for mappings, an empty mapping); integers become
    floating-point numbers where others are. Mappings that all have the same keys get one more or lose one in the first
    record alone, null in either case; of a single record, an empty mapping is the value.
    """
    changed: list[Record] = [dict(record) for record in records]
    types = types_in(changed)
    for path, wanted in missing.items():
        name = path[0]
        if len(path) == 1:
            _widen(changed, name, types.get(path, set()), wanted)
        elif changed and all(isinstance(record.get(name), dict) for record in changed):
            mappings = [dict(record[name]) for record in changed]
            _widen_mappings(mappings, path[1], types.get(path, set()), wanted)
            changed = [{**record, name: mapping} for record, mapping in zip(changed, mappings, strict=True)]
    return changed


def _type(value: Any) -> set[str]:
    if value is None:
        return set()
    names = {bool: "boolean", int: "integer", float: "number", str: "text", dict: "mapping", list: "list"}
    return {names.get(type(value), "text")}


def _is_covered(type: str, first: set[str]) -> bool:
    return type in first or (type == "integer" and "number" in first)


def _widen(records: list[Record], name: str, types: set[str], wanted: set[str]) -> None:
    """Makes room for other types in a column, or in one key of mappings."""
    if types == {"integer"} and "number" in wanted:
        for record in records:
            record[name] = None if record.get(name) is None else float(record[name])
    elif not types:
        for record in records:
            record[name] = {} if "mapping" in wanted else "" if wanted else None


def _widen_mappings(mappings: list[Record], key: str, types: set[str], wanted: set[str]) -> None:
    if len({frozenset(mapping) for mapping in mappings}) > 1 or not mappings[0]:
        return  # it is `Json` already
    if types and not wanted <= {*types, "integer", "number"}:
        if len(mappings) > 1:  # then one key more makes it `Json`, which may hold a number here and a list there
            mappings[0][""] = None
    elif types == {"integer"} or wanted == {"text"}:
        _widen(mappings, key, types, wanted)
    elif key in mappings[0] and mappings[0][key] is None:
        del mappings[0][key]
        if len(mappings) == 1 and mappings[0]:
            mappings[0][key] = {}
    elif key not in mappings[0]:
        mappings[0][key] = None if len(mappings) > 1 else {}
