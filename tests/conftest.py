from __future__ import annotations

from pathlib import Path

import assets as small
import pytest
from end_to_end.trainer import Assets
from filelock import FileLock


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
