"""SQuAD's two metrics, after its evaluation script 1.1 (Rajpurkar et al., EMNLP 2016, section 6.1)."""

from __future__ import annotations

from collections import Counter

from verl_valgen.metrics.base import Metric
from verl_valgen.metrics.text import normalized
from verl_valgen.samples import Sample


class ExactMatch(Metric):
    """1.0 where the normalized answer is the normalized reference, else 0.0."""

    name = "exact_match"
    is_correctness = True

    def __call__(self, sample: Sample) -> float | None:
        if sample.reference is None:
            return None
        return float(normalized(sample.generation) == normalized(sample.reference))


class TokenF1(Metric):
    """The harmonic mean of precision and recall of normalized words, in [0, 1]; 1.0 where both have none."""

    name = "token_f1"
    is_correctness = False

    def __call__(self, sample: Sample) -> float | None:
        if sample.reference is None:
            return None
        answer, reference = normalized(sample.generation).split(), normalized(sample.reference).split()
        if not answer or not reference:
            return float(answer == reference)
        num_common = (Counter(answer) & Counter(reference)).total()
        return 2 * num_common / (len(answer) + len(reference))
