"""Metrics of one's own, for `judging.sh`: a function of a sample, and one with the signature of verl's rewards.

They run in a process beside the trainer: what they raise costs a score and a warning, and training goes on.
"""

from __future__ import annotations

from typing import Any


def brevity(sample: Any) -> float:
    """1.0 for an answer of one token. A sample has the fields of its JSONL record."""
    return 1.0 / max(1, sample.num_new_tokens)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, float]:
    """Recorded as `compute_score` and `compute_score_chars`."""
    return {"score": float(ground_truth in solution_str), "chars": float(len(solution_str))}
