"""The process in which metrics run: `python -m verl_valgen.scores.worker SPEC...`, JSON lines in and out.

The first line out is null: the metrics are loaded. A line in is a list of samples. The lines out are then
`[metric, sample, scores, is_correctness, vote, texts]` or `[metric, sample, error]`, in the order of the metrics, and
null when all is done. What a metric prints goes to the standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from verl_valgen.records import Sample
from verl_valgen.scores.metrics import load_metric
from verl_valgen.scores.metrics.base import Metric
from verl_valgen.scores.metrics.functions import OwnMetric, metric_name
from verl_valgen.text import describe, printable

_PR_SET_PDEATHSIG = 1


def main(specs: list[str]) -> None:
    if sys.platform == "linux":  # a metric that hangs does not outlive the trainer
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    metrics: dict[str, Metric | str] = {}  # or why there is none
    for spec in specs:
        try:
            metrics[spec] = load_metric(spec)
        except Exception as e:
            metrics[spec] = describe(e)
    _write(out, None)
    for line in sys.stdin:
        samples = [Sample(**fields) for fields in json.loads(line)]
        for spec, metric in metrics.items():
            for i, sample in enumerate(samples):
                _write(out, [metric_name(spec), i, *_judge(metric, metric_name(spec), sample)])
        _write(out, None)


def _write(out: TextIO, message: Any) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _judge(metric: Metric | str, name: str, sample: Sample) -> list[Any]:
    """The fields of a `Verdict`, or an error alone."""
    if isinstance(metric, str):
        return [metric]
    try:
        result = metric(sample)
        if result is None:
            return [{}, metric.is_correctness, "", {}]
        values = dict(result) if isinstance(result, Mapping) else {"score": float(result)}
        # verl's reward functions return the answer that they extracted as "pred".
        vote = str(values["pred"]) if "pred" in values else metric.vote(sample)
        scores = {_key(name, key): float(value) for key, value in values.items() if hasattr(value, "__float__")}
        texts = {_key(name, key): value for key, value in values.items() if isinstance(value, str)}
        if values and not scores:
            raise ValueError(f"no value is a number: {printable(repr(values), 200)}")
        return [scores, metric.is_correctness, vote, texts]
    except Exception as e:
        return [describe(e) + (_where_raised(e) if isinstance(metric, OwnMetric) else "")]


def _key(name: str, key: Any) -> str:
    return name if key == "score" else re.sub(r"[^A-Za-z0-9_-]", "_", f"{name}_{key}")


def _where_raised(error: Exception) -> str:
    """File and line of a user's function that an error came out of; "" where it did not get there."""
    package = str(Path(__file__).parents[1]) + os.sep
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(package)]
    if not frames:
        return ""
    innermost = [frame for frame in frames if frame.filename == frames[0].filename][-1]
    return f" ({os.path.basename(innermost.filename)}, line {innermost.lineno})"


if __name__ == "__main__":
    main(sys.argv[1:])
