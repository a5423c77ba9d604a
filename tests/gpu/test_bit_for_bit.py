"""Training on GPUs is bit for bit the same, whether something is generated or not: the runs and the comparison of
`reliability/test_same_training.py`, all cases, with a model of real size and deterministic algorithms."""

from __future__ import annotations

import pytest
from gpu.conftest import needs_two
from reliability.conftest import server  # noqa: F401 (a fixture)
from reliability.test_same_training import (  # noqa: F401 (collected here as well)
    ALL,
    name_of,
    runs_of,
    test_nothing_that_a_run_leaves_differs,
    test_what_is_compared_differs_between_steps,
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=[needs_two] if case[1] == 2 else [], id=name_of(case)) for case in ALL],
)
def runs(request, server, tmp_path_factory, assets):  # noqa: F811
    yield from runs_of(request.param, server, tmp_path_factory.mktemp("same"), assets)
