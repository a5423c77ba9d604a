"""Training on GPUs is bit for bit the same, whether something is generated or not: the runs and the comparison of
`reliability/test_same_training.py`, all cases, with layers of real size and deterministic algorithms."""

from __future__ import annotations

import pytest
from end_to_end.trainer import Assets
from gpu.conftest import HARD_CODED_ATTENTION_TO_SDPA, SDPA, make_assets, needs_two
from reliability.test_same_training import (  # noqa: F401 (collected here as well)
    ALL,
    WAYS,
    Training,
    name_of,
    runs_of,
    test_nothing_that_a_run_leaves_differs,
    test_what_is_compared_differs_between_steps,
)


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Assets:
    """Two layers: a case's twelve checkpoints, with the optimizer's state, stay on the disk until they are compared."""
    return make_assets(tmp_path_factory, "two_layers", num_hidden_layers=2)


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=[needs_two] if case[1] == 2 else [], id=name_of(case)) for case in ALL],
)
def runs(request, server, tmp_path_factory, assets):
    training = Training(server, assets, *request.param, list(WAYS), SDPA, HARD_CODED_ATTENTION_TO_SDPA)
    yield from runs_of(training, tmp_path_factory.mktemp("same"))
