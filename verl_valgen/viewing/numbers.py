"""The numbers of a round from its records, for folders of versions that did not keep them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from verl_valgen.records import DEFAULT_STRATEGY
from verl_valgen.viewing.folder import is_number


def numbers_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Number of samples, and by strategy the means that the records hold, under the keys of `RoundNumbers.flat`.

    As there, answers that failed the check count nowhere, and those that were not begun when time was up in
    `num_samples` alone.
    """
    shown = [record for record in records if record.get("verified") is not False]
    numbers: dict[str, float] = {"num_samples": len(shown)}
    by_strategy: dict[str, list[Mapping[str, Any]]] = {}
    for record in shown:
        if record.get("finish_reason") != "time" or record.get("num_new_tokens"):
            by_strategy.setdefault(str(record.get("strategy", DEFAULT_STRATEGY)), []).append(record)
    for strategy, group in by_strategy.items():
        prefix = "" if list(by_strategy) == [DEFAULT_STRATEGY] else f"{strategy}/"
        numbers |= {f"{prefix}{name}": value for name, value in _means(group).items()}
    return numbers


def _means(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    lengths = [record["num_new_tokens"] for record in records if is_number(record.get("num_new_tokens"))]
    means = {
        "num_new_tokens": _mean(lengths) if lengths else 0.0,
        "cut_off": _mean(record.get("finish_reason") == "length" for record in records),
        "empty": _mean(not record["generation"].strip() for record in records),
    }
    scores: dict[str, list[float]] = {}
    for record in records:
        for name, score in _scores(record):
            scores.setdefault(name, []).append(score)
    return means | {name: _mean(values) for name, values in scores.items()}


def _scores(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    scores = record.get("scores")
    return [(name, score) for name, score in scores.items() if is_number(score)] if isinstance(scores, dict) else []


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers)
