"""All step files of a run are loaded in one call, by Hugging Face's datasets and by pandas, whatever appears later."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest
from destinations import make_round, make_sample

from verl_valgen.trackers.jsonl import JsonlTracker

pytestmark = pytest.mark.any_verl

PARAMS = {"do_sample": True, "top_k": 50, "dtype": "float32"}


def write(directory, *rounds, step=1):
    """Rounds of one step after the other, each by the samples' fields; a tracker of its own each, as after a resume."""
    for number, samples in enumerate(rounds, start=step):
        fields = samples if isinstance(samples, list) else [samples]
        JsonlTracker(directory).log(
            make_round([make_sample(number, i, **{"params": PARAMS} | own) for i, own in enumerate(fields)], number)
        )
    return directory


@pytest.fixture
def load(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def load(directory):
        files = str(directory / "step_*.jsonl")
        return datasets.load_dataset(
            "json", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
        ).to_list()

    return load


def read_with_pandas(directory):
    """As docs/output.md says."""
    files = sorted(directory.glob("step_*.jsonl"))
    return pd.concat([pd.read_json(file, lines=True, dtype=False) for file in files], ignore_index=True)


def plain(value: Any) -> Any:
    """What was recorded, however a table spells it: without the nulls of mappings, and nothing as None."""
    if isinstance(value, str) and value[:1] == "{":
        value = json.loads(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item not in (None, {}, "")}
    return None if value in ("", None) or value != value else value


CASES = {
    "a first score": [{}, {"scores": {"exact_match": 1.0}}],
    "one more score": [{"scores": {"exact_match": 1.0}}, {"scores": {"exact_match": 0.5, "judge": 2.0}}],
    "one more score of several samples": [
        [{"scores": {"a": 1.0}}, {"scores": {"a": 2.0}}],
        [{"scores": {"a": 1.0, "b": 3.0}}, {"scores": {"a": 2.0}}],
    ],
    "a score that was null": [{"scores": {"a": None}}, {"scores": {"a": 1.0}}],
    "one of two scores that was null": [{"scores": {"a": None, "b": 1.0}}, {"scores": {"a": 1.0, "b": 1.0}}],
    "a score that was null of several samples": [
        [{"scores": {"a": None}}, {"scores": {"a": None}}],
        [{"scores": {"a": 1.0}}, {"scores": {"a": None}}],
    ],
    "a score less": [{"scores": {"a": 1.0, "b": 2.0}}, {"scores": {"b": 2.0}}],
    "scores twice": [{}, {"scores": {"a": 1.0}}, {"scores": {"a": 1.0, "b": 2.0}}],
    "a reference": [{"reference": None}, {"reference": "Paris"}],
    "a reference that is a number": [{"reference": "007"}, {"reference": None}, {"reference": "Paris"}],
    "parameters": [{}, {"params": PARAMS | {"min_p": 0.1}}],
    "a parameter that is a list": [[{}, {}], [{"params": PARAMS | {"stop_strings": ["a"]}}, {}]],
    "a parameter that is a list of one sample": [{}, {"params": PARAMS | {"stop_strings": ["a"]}}],
    "a parameter that was a number": [
        [{"params": PARAMS | {"eos_token_id": 1}}, {"params": PARAMS | {"eos_token_id": 1}}],
        {"params": PARAMS | {"eos_token_id": [1, 2]}},
    ],
    "a parameter that was a whole number": [
        {"params": PARAMS | {"repetition_penalty": 1}},
        {"params": PARAMS | {"repetition_penalty": 1.2}},
    ],
    "a ground truth": [{"ground_truth": None}, {"ground_truth": "4"}, {"ground_truth": {"x": 1}}],
    "ground truths of every type": [
        [{"ground_truth": "007"}, {"ground_truth": 4}],
        [{"ground_truth": {"x": 1}}, {"ground_truth": [1, "a"]}],
    ],
    "texts of scores": [{}, {"score_texts": {"pred": "007"}}],
    "one more text of a score": [{"score_texts": {"pred": "007"}}, {"score_texts": {"pred": "1", "why": "2"}}],
    "rows of the data": [{"row": None}, {"row": 3, "data_source": "sums", "file": "b.parquet"}],
    "an answer to the check": [{"verified": None}, {"verified": True}],
}


@pytest.mark.parametrize("rounds", CASES.values(), ids=CASES)
def test_all_steps_load_in_one_call(tmp_path, load, rounds):
    directory = write(tmp_path / "generations", *rounds)
    expected = [
        sample
        for number, samples in enumerate(rounds, start=1)
        for sample in [
            make_sample(number, i, **{"params": PARAMS} | own).to_dict()
            for i, own in enumerate(samples if isinstance(samples, list) else [samples])
        ]
    ]
    for loaded in (load(directory), read_with_pandas(directory).to_dict("records")):
        assert len(loaded) == len(expected)
        for one, right in zip(loaded, expected, strict=True):
            for name, value in right.items():
                found = plain(one[name])
                # In a column of texts a value is one too.
                assert found == plain(value) or found == str(value).lower(), name


def test_007_stays_a_text(tmp_path, load):
    rounds = [{"generation": "007", "reference": "010", "ground_truth": "1e3"}] * 2
    directory = write(tmp_path / "generations", *rounds)
    for loaded in (load(directory), read_with_pandas(directory).to_dict("records")):
        assert [(one["generation"], one["reference"], one["ground_truth"]) for one in loaded] == [
            ("007", "010", "1e3")
        ] * 2


def test_a_folder_that_an_earlier_version_began_loads_with_the_columns_of_this_one(tmp_path, load):
    directory = write(tmp_path / "generations", {"reference": None})
    first = directory / "step_00000001.jsonl"
    record = json.loads(first.read_text())
    for name in ("format", "file", "verified", "score_texts"):
        del record[name]
    first.write_text(json.dumps(record) + "\n")
    write(directory, {"reference": "a", "score_texts": {"pred": "x"}}, step=2)
    for loaded in (load(directory), read_with_pandas(directory).to_dict("records")):
        assert [plain(one["score_texts"]) for one in loaded] == [{}, {"pred": "x"}]
        assert [str(plain(one["format"])) for one in loaded] == ["None", "1"]


def test_only_the_first_file_is_written_again_and_only_where_it_must_be(tmp_path):
    directory = write(tmp_path, {"reference": "a", "scores": {"a": 1.0}}, {"reference": None, "scores": {"a": None}})
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    write(directory, {"reference": "b", "scores": {}}, step=3)
    assert {name: (directory / name).read_bytes() for name in before} == before
    write(directory, {"reference": "b", "scores": {"b": 1.0}, "data_source": "sums"}, step=4)
    changed = [name for name in before if (directory / name).read_bytes() != before[name]]
    assert changed == ["step_00000001.jsonl"]
    first = json.loads((directory / "step_00000001.jsonl").read_text())
    assert (first["scores"], first["data_source"], first["reference"]) == ({"a": 1.0, "b": {}}, "", "a")


@pytest.mark.parametrize("content", ["no JSON\n", "[1]\n", ""])
def test_a_first_file_of_somebody_elses_stays_as_it_is(tmp_path, content):
    (tmp_path / "step_00000001.jsonl").write_text(content)
    write(tmp_path, {}, {"scores": {"a": 1.0}}, step=2)
    assert (tmp_path / "step_00000001.jsonl").read_text() == content
