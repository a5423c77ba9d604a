"""What is peculiar to MLflow: artifacts, tags, and a server that may be gone."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from destinations import make_round, make_run, make_sample
from readback import read_mlflow

from verl_valgen.trackers import composite as composite_module
from verl_valgen.trackers import mlflow as mlflow_module
from verl_valgen.trackers.composite import CompositeTracker
from verl_valgen.trackers.mlflow import MlflowTracker, _metric_name
from verl_valgen.trackers.table import build_table


@pytest.fixture
def mlflow_run(open_destination):
    return open_destination("mlflow")


def _read(mlflow_run):
    mlflow_run.tracker.close()
    return read_mlflow(mlflow_run.uri, mlflow_run.run_id)


def test_latest_round_is_an_artifact_of_its_own(mlflow_run):
    for step in (1, 2):
        samples = [make_sample(step, generation="007", reference=None, scores={"exact": 1.0, "bleu": None})]
        mlflow_run.tracker.log(make_round(samples, step))
    mlflow_run.tracker.log(make_round([make_sample(1, generation="late")], 1))
    run = _read(mlflow_run)
    columns, rows = build_table(samples, 100)
    assert run["latest"] == {"columns": columns, "data": rows}
    assert sorted(run["tables"]) == [1, 2]
    assert run["tags"]["val/sample_1_generation"] == "007"


def test_run_is_not_among_those_with_tables_to_compare(mlflow_run):
    """MLflow's pages find these by a tag, which a training run should not have."""
    mlflow_run.tracker.log(make_round([make_sample(1)], 1))
    assert "mlflow.loggedArtifacts" not in _read(mlflow_run)["tags"]


@pytest.mark.parametrize("num_tagged", [0, 1, 3])
def test_as_many_prompts_are_tags_as_asked_for(mlflow_run, num_tagged):
    tracker = MlflowTracker(make_run(mlflow_tags=num_tagged))
    samples = [make_sample(1, index, completion=completion) for index in range(4) for completion in (0, 1)]
    tracker.log(make_round(samples, 1))
    tags = {key for key in _read(mlflow_run)["tags"] if key.startswith("val/")}
    assert tags == {f"val/sample_{i + 1}_{kind}" for i in range(num_tagged) for kind in ("prompt", "generation")}


def test_tags_of_an_earlier_round_do_not_stay(mlflow_run):
    """Neither those of a round that had more prompts, nor those of the run that is continued."""
    from mlflow import MlflowClient

    MlflowClient().set_tag(mlflow_run.run_id, "val/sample_5_prompt", "of an earlier process")
    MlflowClient().set_tag(mlflow_run.run_id, "val/sample_size", "somebody else's")
    for step, num_prompts in ((1, 3), (2, 1)):
        mlflow_run.tracker.log(make_round([make_sample(step, index) for index in range(num_prompts)], step))
        tags = MlflowClient().get_run(mlflow_run.run_id).data.tags
        assert {key: text for key, text in tags.items() if key.startswith("val/")} == {
            "val/sample_size": "somebody else's",
            **{f"val/sample_{i + 1}_prompt": f"question {i}" for i in range(num_prompts)},
            **{f"val/sample_{i + 1}_generation": f"answer {i} at {step}" for i in range(num_prompts)},
        }


def test_the_page_is_an_artifact(mlflow_run):
    mlflow_run.tracker.add_page("<!doctype html>日本語")
    assert _read(mlflow_run)["page"] == "<!doctype html>日本語"


def test_in_a_run_that_is_continued_no_step_stands_twice(mlflow_run):
    """verl continues the run that `MLFLOW_RUN_ID` names, also from a step before its last."""
    for tracker, steps in ((mlflow_run.tracker, (1, 2, 3)), (MlflowTracker(make_run(max_chars=100)), (2, 3, 4))):
        for step in steps:
            tracker.log(make_round([make_sample(step)], step, scores={"right": float(step)}))
    run = _read(mlflow_run)
    assert sorted(run["tables"]) == [1, 2, 3, 4]
    assert run["metrics"]["val/gen/right"] == {step: float(step) for step in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("val/gen/by_source/openai/gsm8k/exact", "val/gen/by_source/openai/gsm8k/exact"),
        ("val/gen/by_source/数据/exact", "val/gen/by_source/数据/exact"),
        ("val/gen/by_source/a%b?/exact", "val/gen/by_source/a_b_/exact"),
        ("val/gen/by_source/../exact", "val/gen/by_source_../exact"),
        ("val/gen/by_source//exact", "val/gen/by_source_/exact"),
        ("val/gen/", "val/gen_"),
        ("val/" + "x" * 300, "val/" + "x" * 243 + "..."),
    ],
)
def test_metric_names_are_made_acceptable(key, name):
    from mlflow.utils.validation import _validate_metric_name

    assert _metric_name(key) == name
    _validate_metric_name(name)


def test_close_leaves_the_run_open(mlflow_run):
    from mlflow import MlflowClient

    mlflow_run.tracker.log(make_round([make_sample()], 1))
    mlflow_run.tracker.close()
    assert MlflowTracker.is_live(make_run())
    assert MlflowClient().get_run(mlflow_run.run_id).info.status == "RUNNING"


def test_run_of_another_thread_is_not_ours(mlflow_run):
    seen = []

    def look():
        seen.append(MlflowTracker.is_live(make_run()))
        with pytest.raises(RuntimeError, match="no live run"):
            MlflowTracker(make_run(max_chars=100))
        seen.append("refused")

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [False, "refused"]


def _log_rounds(tracker, num_rounds):
    for step in range(num_rounds):
        tracker.log(make_round([make_sample(step)], step, scores={"exact": 1.0}))


def test_server_that_never_answers_holds_nobody_up(mlflow_run, monkeypatch, caplog):
    import mlflow

    # For the thread that the test leaves behind.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    monkeypatch.setattr(composite_module, "_MAX_CLOSE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # connects, and then stays silent
        mlflow.set_tracking_uri(f"http://127.0.0.1:{server.getsockname()[1]}")
        trackers = CompositeTracker({"mlflow": MlflowTracker(make_run(max_chars=100))})
        start = time.monotonic()
        _log_rounds(trackers, composite_module._MAX_PENDING_CALLS - 1)  # with `close`, none too many
        trackers.close()
        assert time.monotonic() - start < 10
    (message,) = caplog.messages
    assert message.startswith("mlflow: a round was not recorded: TimeoutError: mlflow did not finish")


def test_error_comes_back_with_a_later_call(mlflow_run, monkeypatch, caplog):
    import mlflow

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")  # nobody listens there any more
    trackers = CompositeTracker({"mlflow": MlflowTracker(make_run(max_chars=100))})
    trackers.log(make_round([make_sample()], 1))
    trackers.close()
    (message,) = caplog.messages
    assert message.startswith("mlflow: a round was not recorded: mlflow.exceptions.MlflowException: ")
    assert "Max retries exceeded" in message


def test_process_ends_while_a_call_hangs(mlflow_uri):
    """With MLflow's own timeouts and retries, which add up to minutes."""
    program = f"""
        import socket, sys, time
        from pathlib import Path
        import mlflow
        sys.path.insert(0, {str(mlflow_module.__file__.rsplit("/", 3)[0])!r})
        from verl_valgen.records import Round, RoundNumbers, Sample
        from verl_valgen.settings.settings import GenerationSettings
        from verl_valgen.trackers.base import TrackedRun
        from verl_valgen.trackers.composite import CompositeTracker
        from verl_valgen.trackers.mlflow import MlflowTracker

        run = TrackedRun(Path(), GenerationSettings(enabled=True))
        mlflow.set_tracking_uri({mlflow_uri!r})
        mlflow.set_experiment("test")
        mlflow.start_run()
        server = socket.create_server(("127.0.0.1", 0))
        mlflow.set_tracking_uri(f"http://127.0.0.1:{{server.getsockname()[1]}}")
        trackers = CompositeTracker({{"mlflow": MlflowTracker(run)}})
        sample = Sample(1, 0, 0, "default", 0, "p", "p", "g", None, "eos", 1, 1, 0)
        trackers.log(Round(1, [sample], RoundNumbers(1, 1.0, 1.0)))
        server.accept()
        mlflow.set_tracking_uri({mlflow_uri!r})  # MLflow itself ends the run at exit
        print("end of main", flush=True)
    """
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=100, check=True
    )
    assert "end of main" in done.stdout
    assert time.monotonic() - start < 60
