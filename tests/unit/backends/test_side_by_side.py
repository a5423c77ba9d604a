"""Texts are read together where that is known to change nothing, and by models of which nothing is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from verl_valgen.backends import sharing, side_by_side
from verl_valgen.backends.padding import Sharing
from verl_valgen.backends.side_by_side import may_be_read_together, read_apart_from_now_on
from verl_valgen.backends.trial import model_key


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch):
    monkeypatch.setattr(sharing, "_findings", {})
    monkeypatch.setattr(side_by_side, "_to_be_read_apart", set())


def model(stateful: bool = False, **of_config: Any) -> Any:
    config = LlamaConfig(num_hidden_layers=1, **{"max_position_embeddings": 64, **of_config})
    return SimpleNamespace(config=config, dtype=torch.float32, _is_stateful=stateful)


def test_what_a_configuration_tells():
    assert may_be_read_together(model(), [5, 9])
    assert not may_be_read_together(model(stateful=True), [5, 9])
    assert not may_be_read_together(model(), [60, 70]), "a table may grow beyond the context"
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "factor": 4.0}
    longrope = model(rope_scaling={**rope, "original_max_position_embeddings": 16})
    assert [may_be_read_together(longrope, lengths) for lengths in ([5, 16], [5, 17], [17, 30])] == [True, False, True]


@pytest.mark.parametrize(
    ("found", "of_any_lengths", "of_equal_lengths"),
    [
        (Sharing.ANY_LENGTHS, True, True),
        (Sharing.EQUAL_LENGTHS, False, True),
        (Sharing.NONE, False, False),
        (Sharing.NOT_EVEN_A_CACHE, False, False),
    ],
)
def test_what_was_found_of_a_models_batches_counts(found, of_any_lengths, of_equal_lengths):
    for one in (model(), model(stateful=True)):
        sharing._findings[model_key(one)] = found
        assert may_be_read_together(one, [5, 9]) is of_any_lengths
        assert may_be_read_together(one, [7, 7]) is of_equal_lengths


def test_what_a_reading_has_shown_is_remembered_of_every_copy():
    read_apart_from_now_on(model())
    assert not may_be_read_together(model(), [5, 9])
    assert may_be_read_together(model(max_position_embeddings=128), [5, 9])
