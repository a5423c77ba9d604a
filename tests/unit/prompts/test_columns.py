"""What a row says beside its prompt."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from unit.prompts.data import multi_turn, talk

from verl_valgen.prompts.columns import parameters, row_data
from verl_valgen.prompts.datasets import prompts_from_dataset
from verl_valgen.records import RowData


def test_what_a_row_says_beside_its_prompt(tmp_path, tokenizer):
    columns = {
        "data_source": ["openai/gsm8k", None],
        "reward_model": [{"ground_truth": "18", "style": "rule"}, None],
        "extra_info": [{"index": 3, "tags": ["x"]}, None],
        "how": [{"top_k": 3, "top_p": None}, None],
    }
    dataset = multi_turn(tmp_path, tokenizer, [talk("a", "A"), talk("b", "B")], columns)
    first, second = prompts_from_dataset(dataset, [0, 1], tokenizer, params_key="how").prompts
    assert first.data == RowData("openai/gsm8k", "18", {"index": 3, "tags": ["x"]}, {"top_k": 3, "top_p": None})
    assert second.data == RowData()
    assert prompts_from_dataset(dataset, [0], tokenizer).prompts[0].data.params is None


@pytest.mark.parametrize("nothing", [None, float("nan"), pd.NA])
def test_empty_cells_are_none(nothing):
    columns = ("data_source", "reward_model", "ground_truth", "extra_info", "generation_params")
    assert row_data(dict.fromkeys(columns, nothing), "generation_params") == RowData()
    assert row_data({}, "generation_params") == RowData()


def test_the_ground_truth_of_the_reward_model_goes_first():
    both = {"reward_model": {"ground_truth": np.array(["1", "2"])}, "ground_truth": "3"}
    assert row_data(both, "").ground_truth == ["1", "2"]
    assert row_data(both | {"reward_model": {"ground_truth": None}}, "").ground_truth == "3"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {}),
        ("", {}),
        ('{"top_k": 3}', {"top_k": 3}),
        ({"top_k": 3.0, "top_p": 1.0, "seed": None, "min_p": float("nan")}, {"top_k": 3, "top_p": 1.0}),
    ],
)
def test_parameters_are_a_mapping_or_its_json(value, expected):
    result = parameters(value)
    assert result == expected
    assert [type(item) for item in result.values()] == [type(item) for item in expected.values()]


@pytest.mark.parametrize(("value", "reason"), [("{", "it is no JSON"), ("3", "got a int"), ([], "got a list")])
def test_other_parameters_are_refused(value, reason):
    with pytest.raises(ValueError, match=reason):
        parameters(value)


def test_a_ground_truth_that_json_cannot_hold_becomes_text():
    when = datetime(2026, 1, 2)
    truth = {"when": when, 1: b"x", (2,): 3}
    assert row_data({"ground_truth": truth}, "").ground_truth == {"when": str(when), "1": "b'x'"}
