"""Contents that trackers show of a round: table `val/samples`, texts `val/sample_<i>_prompt/_generation`, numbers.

This module owns the columns, the keys, and which text is cut to which length. It knows no tracker: cells are str, int,
float or None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from verl_valgen.records import RoundNumbers, Sample
from verl_valgen.text import storable, truncate

Cell = str | int | float | None

TABLE_KEY = "val/samples"

_SCALAR_PREFIX = "val/gen/"

_COLUMNS = (
    "step",
    "index",
    "strategy",
    "completion",
    "prompt",
    "generation",
    "reference",
    "finish_reason",
    "num_new_tokens",
)


def scalars(numbers: RoundNumbers) -> dict[str, float]:
    """The numbers of a round under the trackers' keys."""
    return {f"{_SCALAR_PREFIX}{name}": value for name, value in numbers.flat().items()}


def build_table(samples: Sequence[Sample], max_chars: int) -> tuple[list[str], list[list[Cell]]]:
    """Column names and rows, one row per sample in the order given.

    The scores of all samples follow the fixed columns in the order in which they first occur. A score that is missing
    or not finite is None.
    """
    scores = list(dict.fromkeys(name for sample in samples for name in sample.scores))
    rows = [
        _fixed_cells(sample, max_chars) + [_number(sample.scores.get(name)) for name in scores] for sample in samples
    ]
    columns = list(_COLUMNS)
    for name in scores:
        columns.append(_score_column(name, columns))
    return columns, rows


def sample_texts(samples: Sequence[Sample], max_chars: int) -> dict[str, str]:
    """`val/sample_<i>_prompt` and `val/sample_<i>_generation`, i from 1, of each prompt's first answer.

    With several strategies or completions only the first of each is taken: a key holds one text per step.
    """
    ordered = sorted(samples, key=lambda sample: sample.index)
    firsts = [sample for sample in ordered if sample.completion == 0 and sample.strategy == ordered[0].strategy]
    texts = {}
    for number, sample in enumerate(firsts, start=1):
        texts[f"val/sample_{number}_prompt"] = _text(sample.prompt_text, max_chars)
        texts[f"val/sample_{number}_generation"] = _text(sample.generation, max_chars)
    return texts


def _fixed_cells(sample: Sample, max_chars: int) -> list[Cell]:
    return [
        sample.step,
        sample.index,
        storable(sample.strategy),
        sample.completion,
        _text(sample.prompt, max_chars),
        _text(sample.generation, max_chars),
        None if sample.reference is None else _text(sample.reference, max_chars),
        sample.finish_reason,
        sample.num_new_tokens,
    ]


def _score_column(name: str, taken: Sequence[str]) -> str:
    """Two columns of one name are an error in one tracker and lose data in another."""
    column = storable(name)
    while column in taken:
        column = f"score_{column}"
    return column


def _text(text: str, max_chars: int) -> str:
    return storable(truncate(text, max_chars))


def _number(score: float | None) -> float | None:
    return float(score) if score is not None and math.isfinite(score) else None
