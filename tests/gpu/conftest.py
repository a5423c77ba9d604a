from __future__ import annotations

from pathlib import Path

import assets as small
import pytest
import torch
from end_to_end.trainer import Assets


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Assets:
    """A Llama of 10 million parameters: its near-ties are those of real models, its runs take seconds."""
    directory = tmp_path_factory.mktemp("assets")
    small.write_model(directory / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    for multiturn in (False, True):
        kind = "multiturn" if multiturn else "singleturn"
        small.write_questions(directory / kind, num_train=40, num_val=32, multiturn=multiturn)
    return Assets(directory)
