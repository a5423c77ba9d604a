"""Fixtures that open real runs and close them again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from destinations import (
    Clearml,
    Console,
    Destination,
    Jsonl,
    Mlflow,
    Swanlab,
    Tensorboard,
    Trackio,
    VerlFile,
    Wandb,
)

OpenDestination = Callable[[str], Destination]


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty database; MLflow takes seconds to make one."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(uri).create_experiment("test", artifact_location=str(folder / "artifacts"))
    return uri


@pytest.fixture(scope="session")
def trackio_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trackio's folder, which it takes from the environment when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        pytest.importorskip("trackio", reason="it needs a huggingface_hub that transformers 4 refuses")
        from trackio.utils import TRACKIO_DIR
    assert folder == TRACKIO_DIR, "trackio was imported before"
    return folder


@pytest.fixture(scope="session")
def clearml_task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An offline task, whose events nobody but the tests make: a task takes seconds to begin, and only one can be open.

    It ends at once if no process of its own reports for it: else that takes a minute.
    """
    folder = tmp_path_factory.mktemp("clearml")
    (folder / "clearml.conf").write_text("sdk.development.report_use_subprocess: false\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEARML_CONFIG_FILE", str(folder / "clearml.conf"))
        patch.setenv("CLEARML_CACHE_DIR", str(folder / "cache"))
        from clearml import Task

        Task.set_offline(True)
        Task.force_store_standalone_script(True)  # else it looks for a repository, with git
        # Without what verl's own call also does to the process: it changes argparse, torch.save and the streams.
        task = Task.init(
            project_name="test", task_name="test", reuse_last_task_id=False, auto_connect_frameworks=False,
            auto_connect_arg_parser=False, auto_connect_streams=False, auto_resource_monitoring=False,
        )  # fmt: skip
        logging.getLogger("clearml").handlers.clear()  # it writes to what is standard output in this test alone
        yield task
        task.close()


@pytest.fixture
def open_destination(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OpenDestination]:
    """Opens the destination of a name; whatever was opened is closed after the test."""
    monkeypatch.chdir(tmp_path)
    opened: list[Destination] = []

    def open_one(name: str) -> Destination:
        if name == "console":
            destination: Destination = Console(capsys)
        elif name == "mlflow":
            destination = Mlflow(request.getfixturevalue("mlflow_uri"))
        elif name == "trackio":
            destination = Trackio(tmp_path, request.getfixturevalue("trackio_storage"))
        elif name == "clearml":
            destination = Clearml(request.getfixturevalue("clearml_task"))
        elif name == "file":
            destination = VerlFile(tmp_path, monkeypatch)
        else:
            kinds = {"jsonl": Jsonl, "wandb": Wandb, "swanlab": Swanlab, "tensorboard": Tensorboard}
            destination = kinds[name](tmp_path)  # type: ignore[assignment]
        opened.append(destination)
        return destination

    yield open_one
    for destination in opened:
        destination.discard()


WITH_SAMPLES = ["console", "jsonl", "wandb", "swanlab", "mlflow", "tensorboard", "trackio", "clearml"]


@pytest.fixture(params=WITH_SAMPLES)
def destination(request: pytest.FixtureRequest, open_destination: OpenDestination) -> Destination:
    return open_destination(request.param)


@pytest.fixture(params=[*WITH_SAMPLES, "file"])
def any_destination(request: pytest.FixtureRequest, open_destination: OpenDestination) -> Destination:
    """Also one that takes numbers alone."""
    return open_destination(request.param)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No tracker depends on which verl and transformers are installed, but for two.

    One is a logger of verl's, the other is installed beside one of them alone.
    """
    for item in items:
        if Path(__file__).parent in item.path.parents and not _depends_on_verl(item):
            item.add_marker(pytest.mark.any_verl)


def _depends_on_verl(item: pytest.Item) -> bool:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return item.path.name == "test_verl_file.py" or "trackio" in parameters
