"""Folders as they are found: of older versions, with broken lines, with files of somebody else's."""

from __future__ import annotations

import json

import pytest
from trackers.destinations import make_sample

from verl_valgen.viewing.folder import Folder, NoSamples, find_folder
from verl_valgen.viewing.numbers import numbers_of
from verl_valgen.viewing.writing import entry_of, step_of

EARLY = {
    "step": 5, "index": 0, "row": 0, "strategy": "default", "completion": 0, "prompt": "p", "prompt_text": "p",
    "generation": "g", "reference": None, "finish_reason": "length", "num_prompt_tokens": 1, "num_new_tokens": 4,
    "seed": 0, "params": {}, "scores": {"exact": 1.0}, "data_source": None,
}  # fmt: skip
"""As version 0.1.0 wrote records at first."""


@pytest.fixture
def told():
    return []


@pytest.fixture
def folder(tmp_path, told):
    return Folder(tmp_path, told.append)


def write(folder, step, *lines):
    path = folder.directory / f"step_{step:08d}.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))


def test_steps_are_those_of_step_files(folder):
    steps = ("20", "3", "123456789")
    others = (
        "step_7.jsonl",
        "step_000000004.jsonl",
        "step_00000005.jsonl.tmp",
        "step_00000006.numbers.json",
        "runs.json",
    )
    for name in (*(f"step_{step:0>8}.jsonl" for step in steps), *others):
        (folder.directory / name).write_text("")
    assert folder.steps() == [3, 20, 123456789]
    assert Folder(folder.directory / "missing").steps() == []


def test_what_is_not_a_sample_is_left_out_and_told(folder, told):
    broken = [b"{\n", b"[1]\n", b"\n", b'{"index": true, "generation": "x"}\n', b"[" * 100_000 + b"\n", b'{"index": 1,']
    write(folder, 5, EARLY, *broken)
    assert folder.records(5) == [EARLY]
    assert told == [
        f"step_00000005.jsonl, line {line}: left out, as it is not a sample" for line in (2, 3, 5, 6, 7)
    ]  # fmt: skip
    assert [answer["generation"] for answer in step_of(folder, 5)["answers"]] == ["g"]


def test_bytes_that_are_no_text_cost_a_character(folder, told):
    write(folder, 5, json.dumps(EARLY | {"generation": "a?b"}).encode().replace(b"?", b"\xff"))
    assert folder.records(5)[0]["generation"] == "a\ufffdb"
    assert told == []


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', "{}", '{"numbers": [1]}', "null"])
def test_files_about_a_run_may_be_broken(folder, content):
    write(folder, 5, EARLY)
    for name in ("runs.json", "best.json", "step_00000005.numbers.json"):
        (folder.directory / name).write_text(content)
    assert step_of(folder, 5)["numbers"] == {
        "num_samples": 1,
        "num_new_tokens": 4,
        "cut_off": 1,
        "empty": 0,
        "exact": 1,
    }
    entry = entry_of(folder, [5])
    assert (entry["best_metric"], entry["best"]) == (None, None)


def test_the_best_value_of_a_folder_without_runs_is_in_best_json(folder):
    best = {"metric": "exact", "mode": "min", "value": 0.5, "step": 5, "before": []}
    (folder.directory / "best.json").write_text(json.dumps(best))
    entry = entry_of(folder, [5])
    assert (entry["best_metric"], entry["best_mode"], entry["best"]) == ("exact", "min", {"value": 0.5, "step": 5})
    # Of a run that watched nothing it is an earlier run's.
    (folder.directory / "runs.json").write_text(json.dumps([{"generation": {"best_metric": ""}}]))
    assert (entry_of(folder, [5])["best_metric"], entry_of(folder, [5])["best"]) == (None, None)


def test_numbers_that_were_not_kept_are_those_of_the_records():
    def record(strategy, **fields):
        return make_sample(strategy=strategy, **fields).to_dict()

    greedy = [
        record("greedy", scores={"exact": 1.0, "f1": 0.5}, num_new_tokens=2),
        record("greedy", scores={"exact": 0.0, "f1": None}, num_new_tokens=4, finish_reason="length", generation=" "),
        record("greedy", finish_reason="time", num_new_tokens=0, generation=""),  # not begun
        record("greedy", verified=False, scores={}, num_new_tokens=99),
    ]
    numbers = numbers_of([*greedy, record("nucleus", num_new_tokens=7)])
    assert numbers == {
        "num_samples": 4, "greedy/num_new_tokens": 3, "greedy/cut_off": 0.5, "greedy/empty": 0.5, "greedy/exact": 0.5,
        "greedy/f1": 0.5, "nucleus/num_new_tokens": 7, "nucleus/cut_off": 0, "nucleus/empty": 0,
    }  # fmt: skip


def test_numbers_that_the_records_hold_are_those_that_were_logged():
    """Of what a round logs, all that a record can tell, under the same keys."""
    from verl_valgen.scores.aggregates import summarize_round

    for strategies in ((), ("greedy", "nucleus")):
        samples = [
            make_sample(index=i, strategy=strategy, num_new_tokens=i, finish_reason="length" if i else "eos")
            for i in range(3)
            for strategy in strategies or ("default",)
        ]
        logged = summarize_round(samples, 1.0, 10, strategies=strategies).flat()
        found = numbers_of([sample.to_dict() for sample in samples])
        assert found == {key: value for key, value in logged.items() if key not in ("seconds", "tokens_per_s")}


def test_the_folder_is_the_one_with_the_samples(tmp_path):
    generations = tmp_path / "checkpoints" / "generations"
    generations.mkdir(parents=True)
    for path in (generations, generations.parent, tmp_path / "nowhere"):
        with pytest.raises(NoSamples, match=r"no samples in .*: there is no step_\*\.jsonl"):
            find_folder(path)
    write(Folder(generations), 5, EARLY)
    assert find_folder(generations) == find_folder(generations.parent) == generations
