"""Forty architectures, from the copy of their weights to their answers; `make zoo` examines all that there are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers
from zoo.forks import Zookeeper
from zoo.known import COMMON, KINDS, KNOWN, known
from zoo.page import not_right

FORTY = (*COMMON, *KINDS)


@pytest.fixture(scope="session")
def zookeeper() -> Iterator[Zookeeper]:
    keeper = Zookeeper()
    yield keeper
    keeper.close()


def test_there_are_forty_and_nothing_is_known_of_others():
    assert len(set(FORTY)) == len(FORTY) == 40
    assert {entry.name for entry in KNOWN} <= set(FORTY)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # In two groups: with two workers each has a process that forks.
    [pytest.param(name, marks=pytest.mark.xdist_group(f"zoo:{i % 2}")) for i, name in enumerate(FORTY)],
)
def test_what_is_shown_is_what_the_model_says(zookeeper, name):
    found = not_right(zookeeper.examine(name))
    expected = known(name, transformers.__version__)
    assert found.keys() == expected.keys(), f"{name}: found {found}, known {expected}"
    if "not built" in found:
        pytest.skip(found["not built"])
