"""Metrics judge single samples. Here are their names, and how a setting becomes a metric.

A new one is a class in a module here and a line in `METRICS`. `check_metrics` executes nothing of a user's: functions
are loaded where they run, in a process of their own (`worker.py`). No module here imports torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

from verl_valgen.scores.metrics.base import Metric
from verl_valgen.scores.metrics.functions import OwnMetric, check_function, metric_name
from verl_valgen.scores.names import RESERVED
from verl_valgen.settings.checks import ConfigError, plain


class BuiltIn(NamedTuple):
    path: str
    """module:class"""
    package: str | None = None
    """The package that the metric imports."""
    extra: str | None = None
    """Our extra that installs the package."""


METRICS = {
    "exact_match": BuiltIn("verl_valgen.scores.metrics.squad:ExactMatch"),
    "token_f1": BuiltIn("verl_valgen.scores.metrics.squad:TokenF1"),
    "rouge_l": BuiltIn("verl_valgen.scores.metrics.overlap:RougeL", "rouge_score", "metrics"),
    "bleu": BuiltIn("verl_valgen.scores.metrics.overlap:Bleu", "sacrebleu", "metrics"),
    "chrf": BuiltIn("verl_valgen.scores.metrics.overlap:ChrF", "sacrebleu", "metrics"),
    "math": BuiltIn("verl_valgen.scores.metrics.math:Math", "math_verify", "math"),
}


def check_metrics(specs: Sequence[str], source: str) -> None:
    """
    Args:
        specs: Names of `METRICS`, `file.py:function`, `module:function`; a function with a name of its own before it:
            `name=module:function`.
        source: Where they come from, for errors.

    Raises:
        ConfigError: One is unknown, cannot be loaded here, or has the name of another.
    """
    names: set[str] = set()
    for spec in specs:
        if ":" in spec:
            check_function(spec, source)
        elif spec not in METRICS:
            raise ConfigError(
                f"{source} must be names ({', '.join(METRICS)}) or functions (file.py:function, module:function), "
                f"got {plain(spec)!r}"
            )
        else:
            package, extra = METRICS[spec].package, METRICS[spec].extra
            if package is not None and find_spec(package) is None:
                raise ConfigError(f"{source}: {spec} needs a package: pip install verl-valgen[{extra}]")
        name = metric_name(spec)
        if name in RESERVED:
            raise ConfigError(f"{source}: {plain(spec, 200)}: a round has a number called {name} already")
        if name in names:
            raise ConfigError(f"{source} must have different names, got {plain(name)!r} twice")
        names.add(name)


def load_metric(spec: str) -> Metric:
    """Raises whatever a user's module raises."""
    if ":" in spec:
        return OwnMetric(spec)
    module, _, attribute = METRICS[spec].path.partition(":")
    return getattr(importlib.import_module(module), attribute)()
