"""Fixtures that open real runs and close them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from destinations import Console, Destination, Jsonl, Mlflow, Swanlab, Wandb

OpenDestination = Callable[[str], Destination]


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty database; MLflow takes seconds to make one."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(uri).create_experiment("test", artifact_location=str(folder / "artifacts"))
    return uri


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
        else:
            destination = {"jsonl": Jsonl, "wandb": Wandb, "swanlab": Swanlab}[name](tmp_path)  # type: ignore[assignment]
        opened.append(destination)
        return destination

    yield open_one
    for destination in opened:
        destination.discard()


@pytest.fixture(params=["console", "jsonl", "wandb", "swanlab", "mlflow"])
def destination(request: pytest.FixtureRequest, open_destination: OpenDestination) -> Destination:
    return open_destination(request.param)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No tracker depends on which verl and transformers are installed."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.any_verl)
