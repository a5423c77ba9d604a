"""Which rows `generation.rows` chooses."""

from __future__ import annotations

import pandas as pd
import pytest
from unit.prompts.data import Items
from unit.prompts.test_places import frame, kept, write

from verl_valgen.prompts.rows import chosen_rows
from verl_valgen.prompts.sources import read_prompts
from verl_valgen.settings.checks import ConfigError
from verl_valgen.settings.settings import GenerationSettings


@pytest.mark.parametrize(
    ("choice", "limit", "rows"),
    [
        ("first", 3, [0, 1, 2]),
        ("first", 99, list(range(12))),
        ([7, 3], 1, [7, 3]),
        ({"per_source": 2}, 1, [0, 1, 2, 3, 4, 5]),
        ({"per_source": 99}, 1, list(range(12))),
    ],
)
def test_rows_are_chosen(tmp_path, tokenizer, choice, limit, rows):
    assert chosen_rows(kept(write(tmp_path, frame(0, 12)), tokenizer), choice, limit) == rows


def test_rows_without_a_source_are_a_source_of_their_own(tmp_path, tokenizer):
    rows = frame(0, 6).assign(data_source=["a", None, "a", None, None, "b"])
    assert chosen_rows(kept(write(tmp_path, rows), tokenizer), {"per_source": 1}, 5) == [0, 1, 5]


def test_a_list_counts_over_all_files_and_not_over_what_verl_keeps(tmp_path, tokenizer):
    paths = write(tmp_path, frame(0, 6), frame(6, 12))
    dataset = kept(paths, tokenizer, 11, seed=1)
    all_rows = {question: number for number, question in enumerate(pd.concat([frame(0, 6), frame(6, 12)])["question"])}
    in_dataset = [all_rows[question] for question in dataset.dataframe["question"]]
    listed = in_dataset[7:2:-2]
    assert chosen_rows(dataset, listed, 5) == [7, 5, 3]
    prompts = read_prompts(dataset, [7, 5, 3], tokenizer, GenerationSettings(enabled=True), {}, [])
    assert [(prompt.file, prompt.row, prompt.stream) for prompt in prompts] == [
        (paths[number // 6], number % 6, number) for number in listed
    ]
    (left_out,) = set(range(12)) - set(in_dataset)
    with pytest.raises(ConfigError, match=f"row {left_out} is not among the 11 of 12 rows .*data.val_max_samples"):
        chosen_rows(dataset, [in_dataset[0], left_out], 5)


@pytest.mark.parametrize("dataset", ["files", "items"])
def test_rows_beyond_the_data_are_named(tmp_path, tokenizer, dataset):
    data = kept(write(tmp_path, frame(0, 12)), tokenizer) if dataset == "files" else Items(*range(12))
    message = r"generation\.rows must be rows of the validation data, which has 12 rows \(0 to 11\), got rows 12, 40$"
    with pytest.raises(ConfigError, match=message):
        chosen_rows(data, [3, 12, 40], 5)


def test_sources_need_their_column():
    with pytest.raises(ConfigError, match="per_source needs a column data_source"):
        chosen_rows(Items(1, 2), {"per_source": 1}, 5)
