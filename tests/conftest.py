from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import assets as small
import pytest
from end_to_end.server import TrainerServer
from end_to_end.trainer import RAY, Assets
from filelock import FileLock


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`, tests that share runs go to one worker, and no others."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_shared_runs(item)))


def _shared_runs(item: pytest.Item) -> str:
    """A name for the runs that a test uses: its module, and which parameters of its fixtures outlive a test."""
    module = item.path.relative_to(Path(__file__).parent)
    call = getattr(item, "callspec", None)
    shared = [] if call is None else [name for name, scope in call._arg2scope.items() if scope.value != "function"]
    return ":".join([str(module), *(str(call.indices[name]) for name in sorted(shared))])


@pytest.fixture(scope="session")
def assets(tmp_path_factory, worker_id) -> Assets:
    """A small Llama and questions, made once however many workers there are."""
    base = tmp_path_factory.getbasetemp()
    directory = Path(base if worker_id == "master" else base.parent) / "assets"
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            small.write_model(directory / "model", hidden_size=32, intermediate_size=64)
            for multiturn in (False, True):
                kind = "multiturn" if multiturn else "singleturn"
                small.write_questions(directory / kind, num_train=40, num_val=20, multiturn=multiturn)
    return Assets(directory)


@pytest.fixture(scope="session")
def server() -> Iterator[TrainerServer]:
    """For runs of verl's own program that need no process of their own from the start."""
    server = TrainerServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def ray_server() -> Iterator[TrainerServer]:
    """For `verl.trainer.sft_trainer_ray`, whose workers are forks of the driver: see `end_to_end/fork_group.py`."""
    server = TrainerServer(RAY, always_before="import end_to_end.fork_group as g; g.take_rays_place(); del g\n")
    yield server
    server.close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """With a chat template, and a token for each character; a module's own, which it may change."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("model")
    small.write_model(directory, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    return AutoTokenizer.from_pretrained(directory)
