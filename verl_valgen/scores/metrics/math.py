"""Whether a mathematical answer is right, as math-verify has it."""

from __future__ import annotations

import re
from typing import Any

from verl_valgen.records import Sample
from verl_valgen.scores.metrics.base import Metric

# A word, where LaTeX's commands are none. (`2xy` and `5 x` have none.)
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|\s[A-Za-z]{2,}")
_DELIMITERS = ("$", "\\boxed", "\\(", "\\[")


class Math(Metric):
    """1.0 where the answer's value is that of the reference, else 0.0: `0.5` is `\\boxed{\\frac{1}{2}}`. A reference
    in which math-verify finds no mathematics is none."""

    name = "math"
    is_correctness = True

    def __init__(self) -> None:
        try:
            import math_verify
            import sympy  # its own dependency
        except ImportError as error:
            raise ImportError("math needs a package: pip install verl-valgen[math]") from error
        self._parse, self._verify, self._sympy = math_verify.parse, math_verify.verify, sympy

    def __call__(self, sample: Sample) -> float | None:
        right = sample.reference if sample.ground_truth is None else str(sample.ground_truth)
        if right is None:
            return None
        gold = self._parsed(right)
        return float(self._verify(gold, self._parsed(sample.generation))) if gold else None

    def _parsed(self, text: str) -> list[Any]:
        """The mathematics that math-verify finds in a text.

        It recognises a formula within delimiters only; of a bare one it would take the first number.
        """
        is_bare = not any(delimiter in text for delimiter in _DELIMITERS) and not _PROSE.search(text)
        return (is_bare and self._parse(f"${text}$")) or self._parse(text)

    def vote(self, sample: Sample) -> str:
        parsed = self._parsed(sample.generation)
        if not parsed:
            return super().vote(sample)
        value = parsed[0]  # 0.5, or one half
        return str(self._sympy.nsimplify(value, rational=True) if isinstance(value, self._sympy.Expr) else value)
