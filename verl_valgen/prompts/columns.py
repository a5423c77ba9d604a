"""Reads the columns of a row beside its messages: data source, ground truth, generation parameters.

This module knows verl's names of columns. All columns are optional, and may hold values of any type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from verl_valgen.records import RowData
from verl_valgen.settings.generation_config import WHOLE_NUMBERS


def row_data(columns: Mapping[str, Any], params_key: str) -> RowData:
    """The optional columns of a row, None where they are missing or empty.

    Args:
        columns: The whole row.
        params_key: The column that holds the row's own generation parameters.
    """
    reward_model = cell_value(columns.get("reward_model"))
    ground_truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    data_source = cell_value(columns.get("data_source"))
    return RowData(
        data_source=None if data_source is None else str(data_source),
        ground_truth=_as_json(cell_value(columns.get("ground_truth")) if ground_truth is None else ground_truth),
        extra_info=cell_value(columns.get("extra_info")),
        params=cell_value(columns.get(params_key)),
    )


def _as_json(value: Any) -> Any:
    """A value as it comes back from JSON, in which it is recorded: what JSON cannot hold becomes text."""
    try:
        return json.loads(json.dumps(value, default=str, skipkeys=True))
    except (ValueError, RecursionError):  # circular, or nested too deeply
        return str(value)[:1000]


def parameters(value: Any) -> dict[str, Any]:
    """A row's own generation parameters, from a mapping or its JSON; {} for an empty cell.

    Raises:
        ValueError: `value` is neither.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"it is no JSON ({e})") from None
    if value is None or value == "":
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"it must be a mapping or JSON of one, got a {type(value).__name__}")
    # In a table every row has all columns of a mapping, those that it does not set too; and where some rows do not,
    # pandas makes floating-point numbers of the others' integers.
    non_empty = {str(name): item for name, item in value.items() if not _is_empty(item)}
    return {name: _integer_again(item) if name in WHOLE_NUMBERS else item for name, item in non_empty.items()}


def cell_value(value: Any) -> Any:
    """The Python value of a table's cell; None for an empty one (None, NaN, pandas.NA)."""
    value = without_arrays(value)
    return None if _is_empty(value) else value


def without_arrays(value: Any) -> Any:
    """`value` with lists for the nested arrays that parquet gives: to a template, an array of two is neither true nor
    false."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: without_arrays(item) for key, item in value.items()}
    return [without_arrays(item) for item in value] if isinstance(value, list) else value


def without_made_up_keys(value: Any) -> Any:
    """`value` without the keys of its mappings that hold nothing.

    In Arrow every mapping of a column has the keys of all of them, and null for those that it did not have. A null
    that somebody wrote cannot be told from these.
    """
    if isinstance(value, Mapping):
        return {key: without_made_up_keys(item) for key, item in value.items() if item is not None}
    return [without_made_up_keys(item) for item in value] if isinstance(value, list) else value


def _integer_again(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_empty(value: Any) -> bool:
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and math.isnan(value))
