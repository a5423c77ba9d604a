"""Forty architectures, from the copy of their weights to their answers; `make zoo` examines all that there are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from zoo.forks import Zookeeper
from zoo.judging import judge
from zoo.known import COMMON, KINDS, KNOWN, known
from zoo.page import not_right
from zoo.patients import GREEDY, SAMPLING

from verl_valgen.records import Request

FORTY = (*COMMON, *KINDS)


@pytest.fixture(scope="session")
def zookeeper() -> Iterator[Zookeeper]:
    keeper = Zookeeper()
    yield keeper
    keeper.close()


def test_there_are_forty_and_nothing_is_known_of_others():
    assert len(set(FORTY)) == len(FORTY) == 40
    assert {entry.name for entry in KNOWN} <= set(FORTY)


@pytest.mark.parametrize("params", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_the_judge_sees_a_single_token_that_is_not_chosen(params):
    logits = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)) * 3
    request = Request([5, 6, 7], (1, 0), params)
    chosen: list[int] = []
    for position in range(len(logits)):
        wrong = [judge(logits[: position + 1], [*chosen, token], request, 3).num_wrong for token in range(24)]
        assert sorted(wrong) == [0] + [1] * 23
        chosen.append(wrong.index(0))


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
