"""Samples in MLflow, in the run that verl opened.

A server that does not answer blocks one call for four minutes, so no call is waited for. In a thread of our own
`mlflow.log_*` would silently open a new run: hence `MlflowClient` and the run's id throughout. `MlflowClient.log_table`
is not used: it turns "007" into 7.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
import sys
import time

from verl_valgen.records import Round
from verl_valgen.text import truncate
from verl_valgen.trackers.base import TrackedRun, Tracker
from verl_valgen.trackers.table import Cell, build_table, sample_texts, scalars

_LATEST = "val_samples/latest.json"

_LOGGED_ARTIFACTS_TAG = "mlflow.loggedArtifacts"
"""JSON list of the tables that the run's page offers."""

_ALWAYS_LOGGED = "val/gen/num_samples"
"""A key of every round."""

# MLflow's own limits. For tags, every store takes 5000 characters; only newer servers take 8000.
_MAX_TAG_CHARS = 5000
_MAX_METRIC_NAME_CHARS = 250


class MlflowTracker(Tracker):
    """Writes a csv artifact per step; the latest round also as a table, its texts as tags; scalars as metrics."""

    is_waited_for = False

    def __init__(self, run: TrackedRun) -> None:
        """Takes hold of this thread's live run. Raises ImportError without the package, RuntimeError without a run."""
        try:
            import mlflow
        except ImportError as error:
            raise ImportError("samples in mlflow need the package: pip install verl-valgen[mlflow]") from error
        active_run = mlflow.active_run()
        if active_run is None:
            raise RuntimeError("mlflow has no live run in this thread")
        self._run_id = active_run.info.run_id
        self._client = mlflow.MlflowClient()
        self._new_metric = mlflow.entities.Metric
        self._is_registered = False
        self._max_chars = run.settings.max_tracker_chars
        self._logged_steps: set[int] | None = None
        """Steps whose numbers the run has; None until the run is asked, as it may be a continued one."""

    @classmethod
    def is_live(cls, run: TrackedRun) -> bool:
        """Whether this thread opened a run; does not import the package."""
        mlflow = sys.modules.get("mlflow")
        return mlflow is not None and mlflow.active_run() is not None

    def log(self, round: Round) -> None:
        try:
            self._log_samples(round)
        finally:  # the numbers do not depend on the table
            self._log_numbers(round)

    def _log_samples(self, round: Round) -> None:
        columns, rows = build_table(round.samples, self._max_chars)
        texts = sample_texts(round.samples, min(self._max_chars, _MAX_TAG_CHARS))
        latest = json.dumps({"columns": columns, "data": rows}, ensure_ascii=False, allow_nan=False)
        self._client.log_text(self._run_id, _to_csv(columns, rows), f"val_samples/step_{round.step:08d}.csv")
        self._client.log_text(self._run_id, latest, _LATEST)
        # One by one: a batch is refused beyond 100 tags or a megabyte.
        for key, text in texts.items():
            self._client.set_tag(self._run_id, key, text)
        if not self._is_registered:
            self._register_latest()
            self._is_registered = True

    def _log_numbers(self, round: Round) -> None:
        """Leaves a step alone that the run has already: MLflow would keep both values, and takes none back."""
        step = round.step
        if self._logged_steps is None:
            history = self._client.get_metric_history(self._run_id, _ALWAYS_LOGGED)
            self._logged_steps = {metric.step for metric in history}
        if step in self._logged_steps:
            return
        now_ms = int(time.time() * 1000)
        metrics = [
            self._new_metric(_metric_name(key), float(value), now_ms, step)
            for key, value in scalars(round.numbers).items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)
        self._logged_steps.add(step)

    def _register_latest(self) -> None:
        """Adds `latest.json` to the tables that the run's page offers."""
        tag = self._client.get_run(self._run_id).data.tags.get(_LOGGED_ARTIFACTS_TAG, "[]")
        merged = _with_latest(tag)
        if merged != tag:
            self._client.set_tag(self._run_id, _LOGGED_ARTIFACTS_TAG, merged)


def _with_latest(tag: str) -> str:
    """The value `tag` of `mlflow.loggedArtifacts` with `latest.json` in it; `tag` itself where it cannot be added."""
    try:
        tables = json.loads(tag)
    except ValueError:
        return tag  # MLflow cut it: somebody logged more tables than it can hold
    entry = {"path": _LATEST, "type": "table"}
    merged = tag if entry in tables else json.dumps([*tables, entry])
    return merged if len(merged) <= _MAX_TAG_CHARS else tag


def _to_csv(columns: list[str], rows: list[list[Cell]]) -> str:
    buffer = io.StringIO()
    # Text is always quoted: a lone carriage return in an unquoted field cannot be read back.
    writer = csv.writer(buffer, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerows([columns, *rows])
    return buffer.getvalue()


def _metric_name(key: str) -> str:
    """`key` as MLflow takes it: one forbidden name would cost the whole batch."""
    allowed = truncate(re.sub(r"[^\w./ :-]", "_", key), _MAX_METRIC_NAME_CHARS)
    # Names are paths there, and must be in normal form.
    return allowed if allowed == posixpath.normpath(allowed) else re.sub(r"/(?=[./])|/$", "_", allowed)
