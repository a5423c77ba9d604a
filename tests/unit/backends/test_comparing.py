"""Two readings of one text: rounding passes, another model does not."""

from __future__ import annotations

import math

import pytest
import torch

from verl_valgen.backends.comparing import EXACT, ROUNDED, ROUTED, closeness, dissimilarity, gaps

CPU = torch.device("cpu")
LOGITS = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 3


def noise(size: float) -> torch.Tensor:
    return LOGITS + size * torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(1))


def test_the_gap_is_relative_and_free_of_what_all_logits_share():
    assert gaps(LOGITS, LOGITS + 7.0).max() < 1e-5
    assert gaps(LOGITS, noise(0.3)).median().item() == pytest.approx(0.1, rel=0.2)
    assert gaps(10 * LOGITS, 10 * noise(0.3)).median().item() == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("ruled_out", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_tokens_that_both_rule_out_do_not_count(ruled_out):
    expected, actual = LOGITS.clone(), noise(0.003)
    expected[:, :100] = actual[:, :100] = ruled_out
    assert gaps(expected, actual).max() < 0.01
    # What one of them rules out alone does.
    assert gaps(expected, noise(0.003)).min() > 0.5
    assert gaps(LOGITS, actual).min() > 0.5


def test_nan_agrees_with_nan_alone():
    broken = LOGITS.clone()
    broken[3, 5] = math.nan
    assert gaps(broken, broken).max() == 0
    for pair in ((LOGITS, broken), (broken, LOGITS)):
        found = gaps(*pair)
        assert found[3] == math.inf
        assert found.isfinite().sum() == 39


def test_a_model_that_says_nothing_agrees_with_itself():
    nothing = torch.zeros_like(LOGITS)
    assert gaps(nothing, nothing).max() == 0


def test_some_positions_may_be_off_by_any_amount_and_many_may_not():
    found = torch.full((40,), 0.01)
    found[:3] = math.inf
    assert dissimilarity(found, ROUNDED) is None
    found[:5] = math.inf
    assert "of 40 positions" in dissimilarity(found, ROUNDED)
    assert dissimilarity(torch.full((40,), 0.1), ROUNDED) is not None
    assert dissimilarity(torch.tensor([0.01]), ROUNDED) is None
    assert dissimilarity(torch.tensor([0.2]), ROUNDED) is not None


def test_how_close_two_readings_are_depends_on_what_they_compute_in():
    assert closeness((torch.float32, torch.float32), True, CPU) == EXACT
    assert closeness((torch.float32, torch.bfloat16), False, CPU) == ROUNDED
    assert closeness((torch.bfloat16, torch.bfloat16), True, CPU) == ROUTED
