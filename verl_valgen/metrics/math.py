"""Whether a mathematical answer is right, as math-verify has it."""

from __future__ import annotations

from verl_valgen.metrics.base import Metric
from verl_valgen.samples import Sample


class Math(Metric):
    """1.0 where the answer's value is that of the reference, else 0.0: `0.5` is `\\boxed{\\frac{1}{2}}`."""

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
        # A bare formula is looked for within dollars or a box.
        gold = self._parse(right) or self._parse(f"${right}$")
        return float(self._verify(gold, self._parse(sample.generation)))

    def vote(self, sample: Sample) -> str:
        parsed = self._parse(sample.generation)
        if not parsed:
            return super().vote(sample)
        value = parsed[0]  # 0.5, or one half
        return str(self._sympy.nsimplify(value, rational=True) if isinstance(value, self._sympy.Expr) else value)
