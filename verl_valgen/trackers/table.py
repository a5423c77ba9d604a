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

_READ = ("prompt_text", "generation", "reference")
"""The columns that lead: what people read. The scores follow them."""

_ABOUT = (
    *("strategy", "completion", "finish_reason", "num_new_tokens", "row", "data_source", "step", "index"),
    "prompt",  # at the end, as it is long, and mostly its text once more
)
"""The columns behind the scores."""


def scalars(numbers: RoundNumbers) -> dict[str, float]:
    """The numbers of a round under the trackers' keys."""
    return {f"{_SCALAR_PREFIX}{name}": value for name, value in numbers.flat().items()}


def build_table(samples: Sequence[Sample], max_chars: int) -> tuple[list[str], list[list[Cell]]]:
    """Column names and rows, one row per sample in the order given.

    The scores of all samples stand between `_READ` and `_ABOUT`, in the order in which they first occur. A score that
    is missing or not finite is None.
    """
    scores = list(dict.fromkeys(name for sample in samples for name in sample.scores))
    rows = [
        [*_read(sample, max_chars), *(_number(sample.scores.get(name)) for name in scores), *_about(sample, max_chars)]
        for sample in samples
    ]
    return [*_READ, *_score_columns(scores), *_ABOUT], rows


def first_answers(samples: Sequence[Sample], strategy: str) -> list[Sample]:
    """Each prompt's first completion of a strategy, in the prompts' order; none of a prompt that lacks it.

    Args:
        strategy: `TrackedRun.first_strategy`.
    """
    by_prompt = sorted(samples, key=lambda sample: sample.index)
    return [sample for sample in by_prompt if sample.completion == 0 and sample.strategy == strategy]


def sample_texts(samples: Sequence[Sample], max_chars: int, strategy: str) -> dict[str, str]:
    """`val/sample_<i>_prompt` and `val/sample_<i>_generation`, i from 1, of each prompt's first answer.

    A key holds one text per step. i is `index` + 1: where a prompt lacks that answer, the others keep their keys.

    Args:
        strategy: See `first_answers`.
    """
    texts = {}
    for sample in first_answers(samples, strategy):
        texts[f"val/sample_{sample.index + 1}_prompt"] = _text(sample.prompt_text, max_chars)
        texts[f"val/sample_{sample.index + 1}_generation"] = _text(sample.generation, max_chars)
    return texts


def _read(sample: Sample, max_chars: int) -> list[Cell]:
    texts = (sample.prompt_text, sample.generation, sample.reference)
    return [None if text is None else _text(text, max_chars) for text in texts]


def _about(sample: Sample, max_chars: int) -> list[Cell]:
    return [
        storable(sample.strategy),
        sample.completion,
        sample.finish_reason,
        sample.num_new_tokens,
        sample.row,
        None if sample.data_source is None else _text(sample.data_source, max_chars),
        sample.step,
        sample.index,
        _text(sample.prompt, max_chars),
    ]


def _score_columns(names: Sequence[str]) -> list[str]:
    """Different names of columns: two of one name are an error in one tracker and lose data in another."""
    columns: list[str] = []
    for name in names:
        column = storable(name)
        while column in (*_READ, *_ABOUT, *columns):
            column = f"score_{column}"
        columns.append(column)
    return columns


def _text(text: str, max_chars: int) -> str:
    return storable(truncate(text, max_chars))


def _number(score: float | None) -> float | None:
    return float(score) if score is not None and math.isfinite(score) else None
