"""The rows and keys that all trackers share."""

from __future__ import annotations

import math

from destinations import make_sample

from verl_valgen.trackers.table import build_table, sample_texts

COLUMNS = [
    "step",
    "index",
    "strategy",
    "completion",
    "prompt",
    "generation",
    "reference",
    "finish_reason",
    "num_new_tokens",
]


def test_scores_follow_the_fixed_columns_in_order_of_first_sight():
    samples = [make_sample(scores={"b": 1.0}), make_sample(index=1, scores={"a": 2, "b": None, "c": math.inf})]
    columns, rows = build_table(samples, 100)
    assert columns == [*COLUMNS, "b", "a", "c"]
    assert [row[-3:] for row in rows] == [[1.0, None, None], [None, 2.0, None]]


def test_score_may_not_hide_a_column():
    columns, rows = build_table([make_sample(scores={"prompt": 0.5, "exact": 1.0})], 100)
    assert columns == [*COLUMNS, "score_prompt", "exact"]
    assert rows[0][4] == "<|user|>question 0"


def test_table_has_the_full_prompt_and_keys_the_readable_one():
    sample = make_sample(prompt="<|user|>hi", prompt_text="hi", generation="yo")
    columns, rows = build_table([sample], 100)
    assert rows[0][columns.index("prompt")] == "<|user|>hi"
    assert sample_texts([sample], 100) == {"val/sample_1_prompt": "hi", "val/sample_1_generation": "yo"}


def test_texts_are_cut_and_storable():
    sample = make_sample(prompt="\ud800" * 20, prompt_text="p" * 20, generation="g\x00" * 20, reference="r" * 20)
    _, rows = build_table([sample], 8)
    assert rows[0][4:7] == ["\ufffd" * 5 + "...", "g\ufffdg\ufffdg...", "rrrrr..."]
    assert list(sample_texts([sample], 8).values()) == ["ppppp...", "g\ufffdg\ufffdg..."]


def test_empty_round_has_columns_and_no_rows():
    assert build_table([], 100) == (COLUMNS, [])
    assert sample_texts([], 100) == {}
