"""Every destination behind one face: open a real run, hand out its tracker, read the run back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from readback import (
    read_clearml,
    read_jsonl,
    read_mlflow,
    read_swanlab,
    read_tensorboard,
    read_trackio,
    read_verl_file,
    read_wandb,
    visible,
)

from verl_valgen.records import GroupNumbers, Round, RoundNumbers, Sample
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import printable, storable
from verl_valgen.trackers.base import TrackedRun, Tracker
from verl_valgen.trackers.clearml import ClearmlTracker
from verl_valgen.trackers.console import ConsoleTracker
from verl_valgen.trackers.jsonl import JsonlTracker
from verl_valgen.trackers.mlflow import MlflowTracker
from verl_valgen.trackers.swanlab import SwanlabTracker
from verl_valgen.trackers.tensorboard import TensorboardTracker
from verl_valgen.trackers.trackio import TrackioTracker
from verl_valgen.trackers.verl_file import VerlFileTracker
from verl_valgen.trackers.wandb import WandbTracker

MAX_CHARS = 200_000


def make_settings(**fields: Any) -> GenerationSettings:
    """These settings, and no page unless they say so."""
    return GenerationSettings(**{"enabled": True, "page": False} | fields)


def make_run(directory: Path = Path(), *, max_chars: int = MAX_CHARS, **fields: Any) -> TrackedRun:
    """A run with these settings, whose texts are cut nowhere unless `max_chars` says so."""
    return TrackedRun(directory, make_settings(max_log_chars=max_chars, max_tracker_chars=max_chars, **fields))


def with_logger(name: str, logger: Any) -> TrackedRun:
    """A run in which verl has made this logger."""
    return replace(make_run(), verl_loggers={name: logger})


def make_sample(step: int = 1, index: int = 0, **fields: Any) -> Sample:
    values: dict[str, Any] = {
        "step": step,
        "index": index,
        "row": index,
        "strategy": "default",
        "completion": 0,
        "prompt": f"<|user|>question {index}",
        "prompt_text": f"question {index}",
        "generation": f"answer {index} at {step}",
        "reference": f"reference {index}",
        "finish_reason": "eos",
        "num_prompt_tokens": 3,
        "num_new_tokens": 4,
        "seed": 0,
        **fields,
    }
    return Sample(**values)


def make_round(
    samples: Sequence[Sample] = (),
    step: int = 1,
    *,
    scores: Mapping[str, float] | None = None,
    by_source: Mapping[str, Mapping[str, float]] | None = None,
    by_strategy: Mapping[str, Mapping[str, float]] | None = None,
) -> Round:
    """A finished round with these scores among its numbers, overall, by data source and by strategy."""
    of_sources, of_strategies = (
        {name: GroupNumbers(scores=numbers) for name, numbers in (groups or {}).items()}
        for groups in (by_source, by_strategy)
    )
    overall = GroupNumbers(scores=scores or {})
    numbers = RoundNumbers(len(samples), 1.0, 1.0, overall, by_strategy=of_strategies, by_source=of_sources)
    return Round(step, samples, numbers)


@dataclass
class Recorded:
    """What a destination holds of one step."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """One per sample, by column."""
    values: dict[str, Any] = field(default_factory=dict)
    """Texts and numbers under their own keys."""


class Destination:
    """What the contract needs to know of a destination."""

    tracker: Tracker
    has_samples = True
    has_table = True
    has_texts = True
    has_scalars = True
    keeps_texts_of_all_steps = True
    kept_of_repeated: Sequence[str] = ("second",)
    """Which samples of a step are found that has two rounds, with another between them."""
    keeps_repeated_in_one_place = False
    """Whether both are found under the same key and step, which the reader refuses."""
    max_text_chars = MAX_CHARS
    shown: Callable[[str], str] = staticmethod(storable)
    """The form in which a text comes back."""

    def cell(self, value: Any) -> Any:
        """The form in which a table cell comes back."""
        return value

    def read(self) -> dict[int, Recorded]:
        """Ends the run and reads it."""
        raise NotImplementedError

    def discard(self) -> None:
        """Leaves nothing open."""


class Console(Destination):
    has_table = has_texts = has_scalars = False
    shown = staticmethod(printable)

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.tracker = ConsoleTracker(make_run(console="samples"))
        self._capsys = capsys

    def read(self) -> dict[int, Recorded]:
        rounds: dict[int, Recorded] = {}
        for block in self._capsys.readouterr().out.split("=== Validation Samples (Step ")[1:]:
            header, *lines = block.rstrip("\n").split("\n")
            lines = lines[: next(i for i, line in enumerate(lines) if line.startswith("Step "))]  # the round in numbers
            pairs = zip(lines[0::3], lines[1::3], strict=True)
            rounds[int(header.split(")")[0])] = Recorded(
                [{"prompt_text": p.partition(": ")[2], "generation": g.partition(": ")[2]} for p, g in pairs]
            )
        return rounds


class Jsonl(Destination):
    has_texts = has_scalars = False

    @staticmethod
    def shown(text: str) -> str:
        return text

    def __init__(self, directory: Path) -> None:
        self.tracker = JsonlTracker(directory)
        self._directory = directory

    def read(self) -> dict[int, Recorded]:
        rounds = read_jsonl(self._directory)
        return {step: Recorded([{**record, **record["scores"]} for record in rounds[step]]) for step in rounds}


class Wandb(Destination):
    kept_of_repeated = ("first", "second")  # in two rows, in this order

    def __init__(self, directory: Path) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        self.run = wandb.init(project="test", dir=directory, mode="offline", settings=settings)
        self.tracker = WandbTracker(make_run())

    def read(self) -> dict[int, Recorded]:
        self.tracker.close()
        self.run.finish()
        return {step: _round(values) for step, values in read_wandb(self.run.settings.sync_dir).items()}

    def discard(self) -> None:
        self.run.finish()


class Swanlab(Destination):
    kept_of_repeated = ("first",)

    def __init__(self, directory: Path) -> None:
        import swanlab

        swanlab.init(project="test", logdir=str(directory), mode="offline")
        self._directory = directory
        self.tracker = SwanlabTracker(make_run())

    def read(self) -> dict[int, Recorded]:
        self.discard()
        (run_dir,) = self._directory.glob("run-*")
        return {step: _round(values) for step, values in read_swanlab(run_dir).items()}

    def discard(self) -> None:
        import swanlab

        if swanlab.has_run():
            swanlab.finish()


class Mlflow(Destination):
    keeps_texts_of_all_steps = False
    max_text_chars = 5000

    def __init__(self, uri: str) -> None:
        import mlflow

        mlflow.set_tracking_uri(uri)
        self.uri = uri
        self.run_id = mlflow.start_run(experiment_id=mlflow.set_experiment("test").experiment_id).info.run_id
        self.tracker = MlflowTracker(make_run(mlflow_tags=1000))

    def cell(self, value: Any) -> str:
        return "" if value is None else str(value)

    def read(self) -> dict[int, Recorded]:
        self.tracker.close()
        run = read_mlflow(self.uri, self.run_id)
        rounds = {step: Recorded(_rows(table)) for step, table in run["tables"].items()}
        if rounds:  # tags hold the latest round only
            tags = {key: value for key, value in run["tags"].items() if key.startswith("val/")}
            rounds[max(rounds)].values.update(tags)
        for key, history in run["metrics"].items():
            for step, value in history.items():
                rounds.setdefault(step, Recorded()).values[key] = value
        return rounds

    def discard(self) -> None:
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        mlflow.end_run()


class Tensorboard(Destination):
    keeps_repeated_in_one_place = True

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.directory = directory / "tensorboard"
        self.writer = SummaryWriter(str(self.directory))
        self.run = with_logger("tensorboard", SimpleNamespace(writer=self.writer))  # as verl's adapter has it
        self.tracker = TensorboardTracker(self.run)

    @staticmethod
    def shown(text: str) -> str:
        return visible(storable(text))

    def cell(self, value: Any) -> str:
        return "" if value is None else str(value)

    def read(self) -> dict[int, Recorded]:
        self.tracker.close()
        return {step: _round(values) for step, values in read_tensorboard(self.directory).items()}

    def discard(self) -> None:
        self.writer.close()


class Trackio(Destination):
    kept_of_repeated = ("first", "second")
    has_texts = False

    def __init__(self, directory: Path, storage: Path) -> None:
        import trackio

        self.path = storage / f"{directory.name}.db"
        trackio.init(project=directory.name, name="run")
        self.tracker = TrackioTracker(make_run())

    def read(self) -> dict[int, Recorded]:
        self.discard()
        return {step: _round(values) for step, values in read_trackio(self.path).items()}

    def discard(self) -> None:
        import trackio
        from trackio import context_vars

        if context_vars.current_run.get() is not None:
            trackio.finish()
            context_vars.current_run.set(None)


class Clearml(Destination):
    has_texts = False

    def __init__(self, task: Any) -> None:
        self.task = task
        self.path = Path(task.get_offline_mode_folder(), "metrics.jsonl")
        self._num_bytes_before = self.path.stat().st_size if self.path.exists() else 0
        self.run = with_logger("clearml", SimpleNamespace(_get_logger=task.get_logger))  # as verl's adapter has it
        self.tracker = ClearmlTracker(self.run)

    def read(self) -> dict[int, Recorded]:
        self.task.flush(wait_for_uploads=True)
        rounds: dict[int, Recorded] = {}
        for step, values in read_clearml(self.path, self._num_bytes_before).items():
            table = values.pop(("val", "samples"), None)
            numbers = {}
            for (title, series), number in values.items():
                root, name = title.rsplit("/", 1)
                numbers[title if series == "(all)" else f"{root}/{series}/{name}"] = number
            rounds[step] = Recorded(_rows(table) if table else [], numbers)
        return rounds

    def discard(self) -> None:
        self.task.flush(wait_for_uploads=True)


class VerlFile(Destination):
    has_samples = has_table = has_texts = False

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from verl.utils.tracking import FileLogger

        self.path = directory / "verl.jsonl"
        monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(self.path))
        self.logger = FileLogger("project", "experiment")
        self.tracker = VerlFileTracker(with_logger("file", self.logger))

    def read(self) -> dict[int, Recorded]:
        self.discard()
        return {step: Recorded(values=dict(numbers)) for step, numbers in read_verl_file(self.path).items()}

    def discard(self) -> None:
        self.logger.finish()


def _rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _round(values: dict[str, Any]) -> Recorded:
    table = values.get("val/samples")
    return Recorded(
        _rows(table) if table else [], {key: value for key, value in values.items() if key != "val/samples"}
    )
