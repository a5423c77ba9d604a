"""No failure of a round stops or stalls a run on two GPUs: the faults of `reliability/test_faults.py`, where the ranks
talk through NCCL. They are planted in what a graph of CUDA's would not call again, so answers come from Hugging Face's
loop."""

from __future__ import annotations

import assets as small
import pytest
from end_to_end.trainer import Assets
from gpu.conftest import HARD_CODED_ATTENTION_TO_SDPA, SDPA, needs_two
from reliability.test_faults import (  # noqa: F401 (fixtures, and what is collected here as well)
    Trainer,
    case,
    delayed,
    raised,
    test_what_raises_costs_its_round_at_most_and_a_warning,
    test_what_takes_too_long_costs_the_rest_of_its_round,
)

pytestmark = needs_two


@pytest.fixture(scope="module")
def trainer(server, tmp_path_factory) -> Trainer:
    directory = tmp_path_factory.mktemp("assets")
    small.write_model(directory / "model")
    small.write_questions(directory / "multiturn", num_train=40, num_val=20, multiturn=True)
    overrides = [*SDPA, "+generation.backend=hf"]
    return Trainer(server, Assets(directory), overrides, HARD_CODED_ATTENTION_TO_SDPA)
