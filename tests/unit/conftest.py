from __future__ import annotations

from pathlib import Path

import pytest

ANY_VERL = {
    "scores",
    "test_text.py",
    "test_patching.py",
    "hosts/test_loaders.py",
    "hosts/test_schedule.py",
    "rounds/test_engine_plan.py",
    "rounds/test_needs.py",
    "rounds/test_plan.py",
    "backends/test_refilling.py",
    "backends/test_sampling.py",
}
"""Folders and modules of tests that do not depend on which verl and transformers are installed."""


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    paths = [Path(__file__).parent / path for path in ANY_VERL]
    for item in items:
        if any(path in (item.path, *item.path.parents) for path in paths):
            item.add_marker(pytest.mark.any_verl)
