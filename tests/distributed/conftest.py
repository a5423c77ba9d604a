from __future__ import annotations

from distributed.testing import start_server, stop_server


def pytest_collection_finish() -> None:
    start_server()


def pytest_unconfigure() -> None:
    stop_server()
