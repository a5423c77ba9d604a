"""The interface of a metric, and how texts are normalized to be compared."""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from verl_valgen.records import Sample

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Metric(ABC):
    """Scores one sample at a time. It may raise, and it may hang: it runs where both cost one value."""

    name: str
    is_correctness: bool | None = None
    """Whether a score is 1 for a right answer and 0 for a wrong one. None: it is if all of a round are."""

    @abstractmethod
    def __call__(self, sample: Sample) -> float | Mapping[str, Any] | None:
        """The score, or several by name; None where there is nothing to compare with."""

    def vote(self, sample: Sample) -> str:
        """Answers with the same vote are the same answer."""
        return normalized(sample.generation)


class ReferenceMetric(Metric):
    """Compares the answer with the reference, where there is one."""

    def __call__(self, sample: Sample) -> float | None:
        return None if sample.reference is None else self.compare(sample.generation, sample.reference)

    @abstractmethod
    def compare(self, answer: str, reference: str) -> float: ...


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space.

    Source: `normalize_answer` of SQuAD's evaluation script 1.1 (P. Rajpurkar et al., "SQuAD: 100,000+ Questions for
    Machine Comprehension of Text", EMNLP 2016).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())
