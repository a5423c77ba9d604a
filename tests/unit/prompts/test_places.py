"""Where a row of a data set lies in its files, whatever verl has kept of them."""

from __future__ import annotations

import pandas as pd
import pytest
from omegaconf import OmegaConf
from unit.prompts.data import Items, MultiTurnSFTDataset, SFTDataset, needs_sft_dataset, talk

from verl_valgen.prompts import places as module
from verl_valgen.prompts.places import Place, places


def frame(start, stop):
    """Rows that differ in what is said and in the source."""
    questions = [f"question {i}" for i in range(start, stop)]
    return pd.DataFrame(
        {
            "messages": [talk(question, "answer") for question in questions],
            "data_source": [f"source {i % 3}" for i in range(start, stop)],
            "question": questions,
            "answer": "answer",
        }
    )


def write(directory, *frames, **kwargs):
    paths = [str(directory / f"{name}.parquet") for name in "abc"[: len(frames)]]
    for path, one in zip(paths, frames, strict=True):
        one.to_parquet(path, **kwargs)
    return paths


def kept(paths, tokenizer, max_samples=-1, cls=MultiTurnSFTDataset, **config):
    """verl's data set of files, which keeps as many rows."""
    keys = {"prompt_key": "question", "response_key": "answer", "max_length": 600, "shuffle": True}
    return cls(OmegaConf.create(paths), tokenizer, OmegaConf.create(keys | config), max_samples=max_samples)


def assert_found(dataset, paths):
    """Every row is where it says that it is."""
    found = places(dataset, range(len(dataset)))
    frames = {path: pd.read_parquet(path) for path in paths}
    offsets = dict(zip(paths, [0, *pd.Series([len(one) for one in frames.values()]).cumsum()], strict=False))
    assert len({place.number for place in found}) == len(dataset)
    for row, place in enumerate(found):
        assert (place.file is None) == (len(paths) == 1)
        file = place.file or paths[0]
        assert place.number == offsets[file] + place.row
        assert frames[file].iloc[place.row]["question"] == dataset.dataframe.iloc[row]["question"]
    return found


@pytest.mark.parametrize("cls", [MultiTurnSFTDataset, pytest.param(SFTDataset, marks=needs_sft_dataset)])
@pytest.mark.parametrize("max_samples", [-1, 8])
@pytest.mark.parametrize("num_files", [1, 3])
def test_rows_of_files_of_which_verl_keeps_a_part_without_a_seed(tmp_path, tokenizer, cls, max_samples, num_files):
    paths = write(tmp_path, *[frame(0, 12), frame(12, 19), frame(19, 24)][:num_files])
    dataset = kept(paths, tokenizer, max_samples, cls)
    found = assert_found(dataset, paths)
    if max_samples == -1:
        assert [place.number for place in found] == list(range(len(dataset)))


@pytest.mark.parametrize(
    "rows",
    [
        frame(0, 24).query("data_source != 'source 1'"),  # with an index of its own
        frame(0, 24).iloc[3:20:2],  # with one that begins at 3
        frame(0, 12).set_index("data_source"),  # with one that is not unique
        frame(0, 12).set_index(["data_source", "answer"]),
    ],
    ids=["filtered", "range", "repeated", "two levels"],
)
@pytest.mark.parametrize("num_files", [1, 2])
def test_files_that_pandas_has_written_with_an_index(tmp_path, tokenizer, rows, num_files):
    paths = write(tmp_path, *[rows, frame(24, 40)][:num_files])
    for max_samples in (-1, 5):
        assert_found(kept(paths, tokenizer, max_samples), paths)


def test_rows_that_are_the_same_in_two_files_have_places_of_their_own(tmp_path, tokenizer):
    paths = write(tmp_path, frame(0, 6), frame(0, 6))
    assert_found(kept(paths, tokenizer, 11), paths)


def test_each_place_is_looked_at_a_fixed_number_of_times(tmp_path, tokenizer, monkeypatch):
    looks = []

    class Counting(Place):
        def __getattribute__(self, name):
            looks.append(name)
            return super().__getattribute__(name)

    paths = write(tmp_path, frame(0, 30), frame(0, 30))
    dataset = kept(paths, tokenizer, 50)
    monkeypatch.setattr(module, "Place", Counting)
    assert len(places(dataset, range(50))) == 50
    assert len(looks) <= 100


def test_row_groups_are_told_apart(tmp_path, tokenizer):
    paths = write(tmp_path, frame(0, 12), frame(12, 24), row_group_size=5)
    assert_found(kept(paths, tokenizer, 20), paths)


@pytest.mark.parametrize("reset", [False, True])
def test_a_data_set_of_ones_own_that_leaves_rows_out(tmp_path, tokenizer, reset):
    """With new labels the rows are not where the labels say."""

    class Own(MultiTurnSFTDataset):
        def _read_files_and_process(self):
            super()._read_files_and_process()
            self.dataframe = self.dataframe[self.dataframe["data_source"] == "source 2"]
            self.dataframe = self.dataframe.reset_index(drop=True) if reset else self.dataframe

        def __len__(self):
            return len(self.dataframe)

    paths = write(tmp_path, frame(0, 12))
    dataset = kept(paths, tokenizer, cls=Own)
    numbers = [0, 1, 2, 3] if reset else [2, 5, 8, 11]
    assert places(dataset, range(4)) == [Place(None, number, number) for number in numbers]


def test_where_files_do_not_tell_rows_are_those_of_the_data_set(tmp_path, tokenizer):
    assert places(Items(1, 2, 3), [2, 0, 2]) == [Place(None, row, row) for row in (2, 0, 2)]
    paths = write(tmp_path, frame(0, 6), frame(6, 12))
    dataset = kept(paths, tokenizer, 7)
    (tmp_path / "b.parquet").unlink()
    assert places(dataset, [6, 1]) == [Place(None, 6, 6), Place(None, 1, 1)]
