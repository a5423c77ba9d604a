"""The rows and keys that all trackers share."""

from __future__ import annotations

import math

import pytest
from destinations import make_sample

from verl_valgen.trackers.table import build_table, sample_texts

READ = ["prompt_text", "generation", "reference"]
ABOUT = ["strategy", "completion", "finish_reason", "num_new_tokens", "row", "data_source", "step", "index", "prompt"]


def test_what_people_read_leads_with_the_scores_behind_it():
    sample = make_sample(8, 3, row=6, data_source="sums", scores={"exact": 1.0}, prompt="<|user|>hi", prompt_text="hi")
    columns, (row,) = build_table([sample], 100)
    assert columns == [*READ, "exact", *ABOUT]
    assert row == ["hi", "answer 3 at 8", "reference 3", 1.0, "default", 0, "eos", 4, 6, "sums", 8, 3, "<|user|>hi"]


def test_own_prompts_have_neither_row_nor_source():
    columns, (row,) = build_table([make_sample(row=None, reference=None)], 100)
    assert [name for name, cell in zip(columns, row, strict=True) if cell is None] == [
        "reference",
        "row",
        "data_source",
    ]


def test_scores_stand_in_order_of_first_sight():
    samples = [make_sample(scores={"b": 1.0}), make_sample(index=1, scores={"a": 2, "b": None, "c": math.inf})]
    columns, rows = build_table(samples, 100)
    assert columns == [*READ, "b", "a", "c", *ABOUT]
    assert [row[3:6] for row in rows] == [[1.0, None, None], [None, 2.0, None]]


@pytest.mark.parametrize("column", [*READ, *ABOUT])
def test_score_may_not_hide_a_column(column):
    sample = make_sample(scores={f"score_{column}": 0.5, column: 0.25, "exact": 1.0})
    columns, (row,) = build_table([sample], 100)
    assert columns == [*READ, f"score_{column}", f"score_score_{column}", "exact", *ABOUT]
    assert row[3:6] == [0.5, 0.25, 1.0]


def test_keys_have_the_readable_prompt():
    sample = make_sample(prompt="<|user|>hi", prompt_text="hi", generation="yo")
    assert sample_texts([sample], 100, "default") == {"val/sample_1_prompt": "hi", "val/sample_1_generation": "yo"}


def test_where_an_answer_failed_no_key_holds_that_of_another_strategy_or_prompt():
    answered = [
        (0, "b"),
        (1, "a"),
        (1, "b"),
        (3, "a"),
        (3, "b"),
    ]  # prompt 0 has none of a, and prompt 2 has none at all
    samples = [make_sample(index=index, strategy=name, generation=f"{name}{index}") for index, name in answered]
    texts = sample_texts(samples, 100, "a")
    generations = {key: text for key, text in texts.items() if key.endswith("_generation")}
    assert generations == {"val/sample_2_generation": "a1", "val/sample_4_generation": "a3"}
    assert sample_texts([sample for sample in samples if sample.strategy == "b"], 100, "a") == {}


def test_texts_are_cut_and_storable():
    texts = {"prompt": "\ud800" * 20, "prompt_text": "p" * 20, "reference": "r" * 20, "data_source": "d\x00" * 20}
    sample = make_sample(generation="g\x00" * 20, **texts)
    _, (row,) = build_table([sample], 8)
    assert row[:3] == ["ppppp...", "g\ufffdg\ufffdg...", "rrrrr..."]
    assert (row[8], row[-1]) == ("d\ufffdd\ufffdd...", "\ufffd" * 5 + "...")
    assert list(sample_texts([sample], 8, "default").values()) == ["ppppp...", "g\ufffdg\ufffdg..."]


def test_empty_round_has_columns_and_no_rows():
    assert build_table([], 100) == ([*READ, *ABOUT], [])
    assert sample_texts([], 100, "default") == {}
