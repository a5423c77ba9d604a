"""The source of truth: complete, strict JSON, and never half a file."""

from __future__ import annotations

import json
import math
import os

import pytest
from destinations import make_round, make_sample
from readback import read_jsonl

from verl_valgen.records import RECORD_FORMAT, Sample
from verl_valgen.trackers.jsonl import JsonlTracker, run_before, set_aside


def test_record_has_every_field_in_order(tmp_path):
    sample = make_sample(12, params={"temperature": 1.0, "dtype": "bfloat16"}, scores={"exact": 1.0})
    JsonlTracker(tmp_path / "not" / "yet" / "there").log(make_round([sample], 12))
    (line,) = (tmp_path / "not/yet/there/step_00000012.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    assert list(record.items()) == list(sample.to_dict().items())
    assert list(record.items())[:3] == [("format", RECORD_FORMAT), ("step", 12), ("index", 0)]


def test_numbers_that_json_lacks_become_null(tmp_path):
    sample = make_sample(params={"stop": [math.inf, 1.0], "nested": {"x": -math.inf}}, scores={"exact": math.nan})
    JsonlTracker(tmp_path).log(make_round([sample], 1))
    record = read_jsonl(tmp_path)[1][0]
    assert record["params"] == {"stop": [None, 1.0], "nested": {"x": None}}
    assert record["scores"] == {"exact": None}


def test_file_is_readable_utf8(tmp_path):
    JsonlTracker(tmp_path).log(make_round([make_sample(generation="日本 \ud83d")], 1))
    content = (tmp_path / "step_00000001.jsonl").read_bytes().decode("utf-8")
    assert "日本 \\ud83d" in content


def test_repeated_step_replaces_its_file(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.log(make_round([make_sample(generation="first"), make_sample(index=1)], 1))
    tracker.log(make_round([make_sample(generation="second")], 1))
    assert [record["generation"] for record in read_jsonl(tmp_path)[1]] == ["second"]
    assert sorted(os.listdir(tmp_path)) == ["step_00000001.jsonl", "step_00000001.numbers.json"]


def _no_space(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("has_old_file", [True, False])
def test_failing_write_leaves_what_was_there(tmp_path, monkeypatch, call, has_old_file):
    tracker = JsonlTracker(tmp_path)
    if has_old_file:
        tracker.log(make_round([make_sample(generation="old")], 1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, call, _no_space)
    with pytest.raises(OSError, match="No space"):
        tracker.log(make_round([make_sample(generation="new")], 1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(before) == 2 * has_old_file


def test_record_that_is_not_json_leaves_what_was_there(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.log(make_round([make_sample(generation="old")], 1))
    with pytest.raises(TypeError, match="JSON serializable"):
        tracker.log(make_round([make_sample(generation="new"), make_sample(params={"x": object()})], 1))
    assert [record["generation"] for record in read_jsonl(tmp_path)[1]] == ["old"]
    assert sorted(os.listdir(tmp_path)) == ["step_00000001.jsonl", "step_00000001.numbers.json"]


def test_place_that_cannot_be_written_raises(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        JsonlTracker(tmp_path / "file").log(make_round([make_sample()], 1))


def test_file_system_that_cannot_sync_directories_is_good_enough(tmp_path, monkeypatch):
    fsync = os.fsync

    def fsync_of_files(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_of_files)
    JsonlTracker(tmp_path).log(make_round([make_sample()], 1))
    assert len(read_jsonl(tmp_path)[1]) == 1


def _touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(name)


def test_set_aside_moves_the_steps_beyond_the_start(tmp_path):
    _touch(tmp_path, "step_00000010.jsonl", "step_00000020.jsonl", "step_123456789.jsonl", "step_30.jsonl", "notes.txt")
    assert set_aside(tmp_path, 10) == tmp_path / "old-1"
    assert sorted(path.name for path in (tmp_path / "old-1").iterdir()) == [
        "step_00000020.jsonl",
        "step_123456789.jsonl",
    ]
    assert (tmp_path / "old-1" / "step_00000020.jsonl").read_text() == "step_00000020.jsonl"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["notes.txt", "old-1", "step_00000010.jsonl", "step_30.jsonl"]


def test_numbers_lie_beside_the_samples(tmp_path):
    JsonlTracker(tmp_path).log(make_round([make_sample(80)], 80, scores={"a": 0.5, "b": math.inf}))
    numbers = {"num_samples": 1.0, "seconds": 1.0, "tokens_per_s": 1.0, "a": 0.5, "b": None}
    content = {"format": 1, "step": 80, "numbers": numbers}
    assert json.loads((tmp_path / "step_00000080.numbers.json").read_text()) == content


def test_numbers_are_set_aside_with_their_steps(tmp_path):
    names = ("step_00000010.jsonl", "step_00000010.numbers.json", "step_00000020.jsonl", "step_00000020.numbers.json")
    _touch(tmp_path, *names, "step_00000030.numbers.json.tmp")
    assert set_aside(tmp_path, 10) == tmp_path / "old-1"
    assert sorted(os.listdir(tmp_path / "old-1")) == list(names[2:])
    assert sorted(os.listdir(tmp_path)) == ["old-1", *names[:2]]


def test_set_aside_takes_the_smallest_free_folder(tmp_path):
    _touch(tmp_path, "step_00000001.jsonl", "old-2")
    (tmp_path / "old-1").mkdir()
    assert set_aside(tmp_path, 0) == tmp_path / "old-3"


def test_set_aside_with_nothing_to_move_only_tidies(tmp_path):
    _touch(tmp_path, "step_00000010.jsonl", "step_00000010.jsonl.tmp", "mine.tmp")
    assert set_aside(tmp_path, 10) is None
    assert sorted(os.listdir(tmp_path)) == ["mine.tmp", "step_00000010.jsonl"]
    assert set_aside(tmp_path / "missing", 0) is None


def test_set_aside_removes_what_a_killed_writer_left(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr("pathlib.Path.unlink", _no_space)
    with pytest.raises(KeyboardInterrupt):
        JsonlTracker(tmp_path).log(make_round([make_sample()], 1))
    monkeypatch.undo()
    assert os.listdir(tmp_path) != []
    assert set_aside(tmp_path, 0) is None
    assert os.listdir(tmp_path) == []


def test_a_line_becomes_a_sample_again(tmp_path):
    sample = make_sample(generation="line\nline \u2028 \ud83d", params={"top_k": 50}, reference=None)
    JsonlTracker(tmp_path).log(make_round([sample], 1))
    assert Sample(**read_jsonl(tmp_path)[1][0]) == sample


def test_a_new_run_takes_nothing_of_an_earlier_one_over(tmp_path):
    _touch(tmp_path, "step_00000010.jsonl", "runs.json", "best.json")
    assert set_aside(tmp_path, 0) == tmp_path / "old-1"
    assert sorted(os.listdir(tmp_path / "old-1")) == ["best.json", "runs.json", "step_00000010.jsonl"]
    assert os.listdir(tmp_path) == ["old-1"]


def test_a_resumed_run_continues_what_belongs_to_both(tmp_path):
    _touch(tmp_path, "step_00000010.jsonl", "step_00000020.jsonl", "runs.json", "best.json")
    assert set_aside(tmp_path, 10) == tmp_path / "old-1"
    assert sorted(os.listdir(tmp_path / "old-1")) == ["best.json", "runs.json", "step_00000020.jsonl"]
    assert sorted(os.listdir(tmp_path)) == ["best.json", "old-1", "runs.json", "step_00000010.jsonl"]


def test_each_run_is_described(tmp_path):
    for start_step, name in ((0, "first \x1b[31m"), (2, "second")):
        tracker = JsonlTracker(tmp_path, {"experiment": name, "start_step": start_step})
        assert not (tmp_path / "runs.json").exists() or start_step > 0  # a run without a round has none
        for step in (start_step + 1, start_step + 2):
            tracker.log(make_round([make_sample(step)], step))
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert [run["experiment"] for run in runs] == ["first \x1b[31m", "second"]


def test_a_description_that_cannot_be_written_costs_no_round(tmp_path):
    tracker = JsonlTracker(tmp_path, {"model": object()})
    with pytest.raises(TypeError, match="JSON serializable"):
        tracker.log(make_round([make_sample(1)], 1))
    tracker.log(make_round([make_sample(2)], 2))
    assert sorted(read_jsonl(tmp_path)) == [1, 2]


def test_a_new_run_takes_nothing_over_where_no_samples_are_left_either(tmp_path):
    _touch(tmp_path, "runs.json", "best.json")
    assert set_aside(tmp_path, 0) == tmp_path / "old-1"
    assert os.listdir(tmp_path) == ["old-1"]


def test_a_best_value_that_starts_anew_is_copied_and_stays_until_it_is_replaced(tmp_path):
    _touch(tmp_path, "step_00000010.jsonl", "best.json", "runs.json")
    assert set_aside(tmp_path, 10, best_too=True) == tmp_path / "old-1"
    assert sorted(os.listdir(tmp_path)) == ["best.json", "old-1", "runs.json", "step_00000010.jsonl"]
    assert sorted(os.listdir(tmp_path / "old-1")) == ["best.json", "runs.json"]


def test_without_a_best_value_there_is_none_to_copy(tmp_path):
    _touch(tmp_path, "step_00000010.jsonl", "runs.json")
    assert set_aside(tmp_path, 10, best_too=True) is None
    assert sorted(os.listdir(tmp_path)) == ["runs.json", "step_00000010.jsonl"]


def test_the_run_before_is_the_one_that_left_the_samples_up_to_a_step(tmp_path):
    runs = [{"start_step": 0, "x": 1}, {"start_step": 10, "x": 2}, {"start_step": 5, "x": 3}, "broken"]
    for number, run in enumerate(runs):
        JsonlTracker(tmp_path, {"run": run} if isinstance(run, str) else run).log(make_round([make_sample()], number))
    assert [(run_before(tmp_path, step) or {}).get("x") for step in (0, 5, 6, 11)] == [None, 1, 3, 3]
    assert run_before(tmp_path / "missing", 5) is None
