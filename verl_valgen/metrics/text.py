"""When two answers are the same to SQuAD."""

from __future__ import annotations

import re
import string

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space.

    Source: `normalize_answer` of SQuAD's evaluation script 1.1 (P. Rajpurkar et al., "SQuAD: 100,000+ Questions for
    Machine Comprehension of Text", EMNLP 2016).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())
