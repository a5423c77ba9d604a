from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from reliability.server import TrainerServer

IS_WHOLE = os.environ.get("VALGEN_RELIABILITY") == "full"
"""Whether whole matrices are run (`make reliability`), or a part of each."""


@pytest.fixture(scope="session")
def server() -> Iterator[TrainerServer]:
    server = TrainerServer()
    yield server
    server.close()
