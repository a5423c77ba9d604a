"""What a row of data says beside its prompt: where it comes from, what is right, how it wants to be answered.

This module knows verl's names of columns. All columns are optional, and of any type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from verl_valgen.records import RowData
from verl_valgen.settings.generation_config import WHOLE_NUMBERS


def row_data(columns: Mapping[str, Any], params_key: str) -> RowData:
    """
    Args:
        columns: The whole row.
    """
    of_reward = cell(columns.get("reward_model"))
    ground_truth = of_reward.get("ground_truth") if isinstance(of_reward, Mapping) else None
    data_source = cell(columns.get("data_source"))
    return RowData(
        data_source=None if data_source is None else str(data_source),
        ground_truth=cell(columns.get("ground_truth")) if ground_truth is None else ground_truth,
        extra_info=cell(columns.get("extra_info")),
        params=cell(columns.get(params_key)),
    )


def parameters(value: Any) -> dict[str, Any]:
    """A row's own generation parameters: a mapping or its JSON; {} for an empty cell.

    Raises:
        ValueError: It is neither.
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
    set_here = {str(name): inner for name, inner in value.items() if not _is_empty(inner)}
    return {name: _whole(inner) if name in WHOLE_NUMBERS else inner for name, inner in set_here.items()}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def plain(value: Any) -> Any:
    """Nested arrays, as parquet gives them, as lists: for a template, an array of two is neither true nor false."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def cell(value: Any) -> Any:
    """A column's value as plain Python; an empty cell (None, NaN, pandas.NA) as None."""
    value = plain(value)
    return None if _is_empty(value) else value


def _is_empty(value: Any) -> bool:
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and math.isnan(value))
