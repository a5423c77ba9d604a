"""Which destinations a run gets, and what is said about the others."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from destinations import make_round, make_run, make_sample
from readback import read_jsonl

import verl_valgen
from verl_valgen.trackers import TRACKERS, open_trackers
from verl_valgen.trackers.base import Tracker


@pytest.fixture
def open_here(tmp_path, caplog):
    caplog.set_level(logging.INFO, "verl_valgen")

    def open_and_listen(loggers):
        composite = open_trackers(loggers, make_run(tmp_path / "generations", max_chars=50))
        return composite, [
            (record.levelname, record.getMessage())
            for record in caplog.records
            if record.name.startswith("verl_valgen")
        ]

    return open_and_listen


def test_files_and_console_are_always_there(open_here, tmp_path, capsys):
    composite, lines = open_here(["console"])
    assert list(composite.trackers) == ["jsonl", "console"]
    assert lines == []
    composite.log(make_round([make_sample(generation="g" * 60)], 3))
    assert [record["generation"] for record in read_jsonl(tmp_path / "generations")[3]] == ["g" * 60]
    assert "Generation 1: " + "g" * 47 + "...\n" in capsys.readouterr().out


def test_live_runs_get_their_trackers(open_here, open_destination):
    destinations = {name: open_destination(name) for name in ("mlflow", "wandb", "swanlab")}
    composite, lines = open_here(["mlflow", "tracking", "console", "swanlab", "wandb"])
    assert list(composite.trackers) == ["jsonl", "console", "mlflow", "wandb", "swanlab"]
    assert lines == []
    composite.log(make_round([make_sample(generation="g" * 60)], 1, scores={"exact": 0.5}))
    composite.close()
    for destination in destinations.values():
        found = destination.read()[1]
        assert found.rows[0]["generation"] == found.values["val/sample_1_generation"] == "g" * 47 + "..."
        assert found.values["val/gen/exact"] == 0.5


def test_logger_without_a_live_run_gets_a_line(open_here):
    composite, lines = open_here(list(TRACKERS))
    assert list(composite.trackers) == ["jsonl", "console"]
    assert lines == [
        ("INFO", f"no samples in {name}: it has no live run; they are in the JSONL files") for name in TRACKERS
    ]


def test_logger_without_an_adapter_gets_a_line(open_here):
    composite, lines = open_here("another")  # verl takes a single name too
    assert list(composite.trackers) == ["jsonl", "console"]
    assert lines == [("INFO", "no samples in another: there is no adapter for it; they are in the JSONL files")]


def test_logger_that_takes_no_samples_gets_a_line_that_says_why(open_here):
    composite, lines = open_here(["console", "rl_insight"])
    assert list(composite.trackers) == ["jsonl", "console"]
    reason = "it takes numbers alone, and shows them without their step"
    assert lines == [("INFO", f"no samples in rl_insight: {reason}; they are in the JSONL files")]


def test_tracker_that_cannot_be_opened_costs_a_warning(open_here, monkeypatch):
    class Broken:
        @classmethod
        def is_live(cls, run):
            return True

        def __init__(self, max_chars):
            raise ConnectionError("down")

    monkeypatch.setattr("verl_valgen.trackers.wandb.WandbTracker", Broken)
    composite, lines = open_here(["wandb"])
    assert list(composite.trackers) == ["jsonl", "console"]
    assert lines == [
        ("WARNING", "wandb: no samples there, they are in the JSONL files: ConnectionError: down"),
    ]


def test_page_that_cannot_be_opened_costs_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "verl_valgen.trackers.page", None)
    composite = open_trackers([], make_run(tmp_path, page=True))
    assert list(composite.trackers) == ["jsonl", "console"]
    (message,) = caplog.messages
    assert message.startswith("page: no samples there, they are in the JSONL files: ModuleNotFoundError: ")


@pytest.mark.parametrize("name", [name for name in TRACKERS if name not in ("file", "vemlp_wandb")])  # which have none
def test_missing_package_names_the_extra(name, monkeypatch):
    for module in [*sys.modules]:
        if module == name or module.startswith(f"{name}."):
            monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, name, None)
    module, class_name = TRACKERS[name].split(":")
    tracker_class = getattr(import_module(module), class_name)
    assert issubclass(tracker_class, Tracker)
    assert tracker_class.is_live(make_run()) is False
    with pytest.raises(ImportError, match=rf"pip install verl-valgen\[{name}\]"):
        tracker_class(make_run())


def test_nothing_heavy_is_imported(tmp_path):
    """Neither by the package of trackers nor by asking whether a run is live."""
    program = """
import json, pathlib, sys
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.trackers import TRACKERS, open_trackers
from verl_valgen.trackers.base import TrackedRun
open_trackers([*TRACKERS, "unknown"], TrackedRun(pathlib.Path(sys.argv[1]), GenerationSettings(enabled=True)))
heavy = "torch wandb swanlab mlflow tensorboard trackio clearml transformers verl pandas numpy tqdm".split()
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(verl_valgen.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []
