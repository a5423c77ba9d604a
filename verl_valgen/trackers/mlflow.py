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
from verl_valgen.trackers.base import TrackedRun, Tracker, package_of
from verl_valgen.trackers.table import Cell, build_table, first_answers, sample_texts, scalars

_LATEST = "val_samples/latest.json"

_PAGE = "val_samples/page.html"

_SAMPLE_TAG = re.compile(r"val/sample_\d+_(prompt|generation)")

_ALWAYS_LOGGED = "val/gen/num_samples"
"""A key of every round."""

# MLflow's own limits. For tags, every store takes 5000 characters; only newer servers take 8000.
_MAX_TAG_CHARS = 5000
_MAX_METRIC_NAME_CHARS = 250


class MlflowTracker(Tracker):
    """Writes a csv artifact per step, which its pages show as a table; scalars as metrics; the latest round also as
    JSON, and some of its texts as tags.

    No table is registered in the tag `mlflow.loggedArtifacts`, as `log_table` does: by it runs are found whose tables
    are to be compared, as those of evaluations are.
    """

    is_waited_for = False
    takes_page = True

    def __init__(self, run: TrackedRun) -> None:
        """Takes hold of this thread's live run. Raises ImportError without the package, RuntimeError without a run."""
        mlflow = package_of("mlflow")
        active_run = mlflow.active_run()
        if active_run is None:
            raise RuntimeError("mlflow has no live run in this thread")
        self._run_id = active_run.info.run_id
        self._client = mlflow.MlflowClient()
        self._new_metric = mlflow.entities.Metric
        self._max_chars = run.settings.max_tracker_chars
        self._first_strategy = run.first_strategy
        self._num_tagged = run.settings.mlflow_tags
        self._tags: set[str] | None = None
        """The run's tags with samples; None until the run is asked, as it may be a continued one."""
        self._latest_step = -1
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
        self._client.log_text(self._run_id, _to_csv(columns, rows), f"val_samples/step_{round.step:08d}.csv")
        if round.step < self._latest_step:  # it comes late
            return
        self._latest_step = round.step
        latest = json.dumps({"columns": columns, "data": rows}, ensure_ascii=False, allow_nan=False)
        self._client.log_text(self._run_id, latest, _LATEST)
        self._tag(round)

    def _tag(self, round: Round) -> None:
        """Shows the first prompts' texts as tags of the run, and takes away those that are of an earlier round."""
        samples = first_answers(round.samples, self._first_strategy)[: self._num_tagged]
        texts = sample_texts(samples, min(self._max_chars, _MAX_TAG_CHARS), self._first_strategy)
        if self._tags is None:
            self._tags = {tag for tag in self._client.get_run(self._run_id).data.tags if _SAMPLE_TAG.fullmatch(tag)}
        # One by one: a batch is refused beyond 100 tags or a megabyte.
        for key in self._tags.difference(texts):
            self._client.delete_tag(self._run_id, key)
            self._tags.discard(key)
        for key, text in texts.items():
            self._client.set_tag(self._run_id, key, text)
            self._tags.add(key)

    def add_page(self, page: str) -> None:
        self._client.log_text(self._run_id, page, _PAGE)

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
