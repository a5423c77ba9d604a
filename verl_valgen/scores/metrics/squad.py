"""SQuAD's two metrics, after its evaluation script 1.1 (Rajpurkar et al., EMNLP 2016, section 6.1)."""

from __future__ import annotations

from collections import Counter

from verl_valgen.scores.metrics.base import ReferenceMetric, normalized


class ExactMatch(ReferenceMetric):
    """1.0 where the normalized answer is the normalized reference, else 0.0."""

    name = "exact_match"
    is_correctness = True

    def compare(self, answer: str, reference: str) -> float:
        return float(normalized(answer) == normalized(reference))


class TokenF1(ReferenceMetric):
    """The harmonic mean of precision and recall of normalized words, in [0, 1]; 1.0 where both have none."""

    name = "token_f1"
    is_correctness = False

    def compare(self, answer: str, reference: str) -> float:
        said, expected = normalized(answer).split(), normalized(reference).split()
        if not said or not expected:
            return float(said == expected)
        num_common = (Counter(said) & Counter(expected)).total()
        return 2 * num_common / (len(said) + len(expected))
