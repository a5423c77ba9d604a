"""The page of a run: it grows with every round, and is what the files alone would give."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

import pytest
from trackers.destinations import make_round, make_sample
from viewing.rounds import data_files, described_run, index, inlined, parsed, step, write_rounds

from verl_valgen.trackers.jsonl import JsonlTracker, set_aside
from verl_valgen.trackers.page import PageTracker
from verl_valgen.viewing import writing
from verl_valgen.viewing.folder import Folder
from verl_valgen.viewing.page_files import write_whole
from verl_valgen.viewing.writing import make_page, one_file

ODD: dict[int, list[Mapping[str, Any]]] = {
    # What the first file has no type for is spelt in another way in it, later.
    30: [{"reference": None, "row": None, "scores": {}}, {"generation": "\ud83d </script>", "row": None}],
    60: [
        {"reference": "a", "scores": {"exact": 1, "judge": float("nan")}, "score_texts": {"pred": "x"}},
        {"verified": False, "generation": "secret", "generation_raw": "secret\ud83d\ude00", "data_source": "sums"},
    ],
    90: [{"scores": {"exact": 0.5}, "params": {"top_p": 1.0, "stop_strings": ["a"]}, "ground_truth": {"x": 1}}] * 2,
}


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "checkpoints" / "generations"


def test_a_page_made_from_the_files_is_the_one_that_the_run_wrote(directory):
    write_rounds(described_run(directory), ODD, {"exact": 0.5})
    live, app = data_files(directory), (directory / "index.html").read_bytes()
    shutil.rmtree(directory / "data")
    assert make_page(Folder(directory)) == directory / "index.html"
    assert data_files(directory) == live
    assert list(live) == ["step_00000030.js", "step_00000060.js", "step_00000090.js", "steps.js"]
    assert (directory / "index.html").read_bytes() == app
    assert index(directory) == {
        "name": "demo", "folder": "checkpoints/generations", "steps": [30, 60, 90], "best_metric": "exact",
        "best_mode": "min", "best": {"value": 0.25, "step": 30},
    }  # fmt: skip
    assert step(directory, 90)["numbers"] == {
        "num_samples": 2, "seconds": 1, "tokens_per_s": 1, "exact": 0.5, "best": 0.25, "best_step": 30
    }  # fmt: skip
    assert b"secret" not in b"".join(live.values())


def test_rounds_that_never_came_to_the_page_are_there_at_the_end(directory):
    """As one that does not keep up loses the oldest."""
    jsonl, page = JsonlTracker(directory), PageTracker(described_run(directory))
    for number in (1, 2, 3, 4):
        round = make_round([make_sample(number)], number)
        jsonl.log(round)
        if number in (1, 3):
            page.log(round)
    assert index(directory)["steps"] == [1, 3]
    page.close()
    assert index(directory)["steps"] == [1, 2, 3, 4]
    assert step(directory, 4)["answers"][0]["generation"] == "answer 0 at 4"


def test_one_file_has_what_the_folder_has(directory, tmp_path):
    write_rounds(described_run(directory), ODD)
    page = tmp_path / "page.html"
    page.write_bytes(one_file(Folder(directory)))
    live = {name: parsed(script)[1] for name, script in data_files(directory).items()}
    assert inlined(page) == {"index": live.pop("steps.js"), "steps": list(live.values())}


def test_two_runs_in_one_file(directory, tmp_path):
    other = tmp_path / "other" / "generations"
    write_rounds(described_run(directory), {30: [{}]})
    write_rounds(described_run(other), {30: [{"generation": "x"}], 40: [{}]})
    page = tmp_path / "page.html"
    page.write_bytes(one_file(Folder(directory), Folder(other)))
    found = inlined(page)
    assert [(run["folder"], run["steps"]) for run in found["index"]["runs"]] == [
        ("checkpoints/generations", [30]), ("other/generations", [30, 40])
    ]  # fmt: skip
    assert [(one["run"], one["step"]) for one in found["steps"]] == [(0, 30), (1, 30), (1, 40)]
    assert found["steps"][0]["prompts"][0]["key"] == found["steps"][1]["prompts"][0]["key"]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("a/generations", "b/generations"), ["demo (a/generations)", "demo (b/generations)"]),
        (("a/run/generations", "b/run/generations"), ["demo (1)", "demo (2)"]),
    ],
)
def test_two_runs_of_one_name_can_be_told_apart(tmp_path, folders, names):
    for folder in folders:
        write_rounds(described_run(tmp_path / folder), {30: [{}]})
    page = tmp_path / "page.html"
    page.write_bytes(one_file(*(Folder(tmp_path / folder) for folder in folders)))
    assert [run["name"] for run in inlined(page)["index"]["runs"]] == names


def test_a_round_writes_its_own_data_and_the_list_of_steps_alone(directory, monkeypatch):
    tracker = PageTracker(described_run(directory))
    tracker.log(make_round([make_sample(1)], 1))
    written = []
    replace = "verl_valgen.viewing.page_files.replace_file"
    monkeypatch.setattr(replace, lambda path, content, writer: written.append(path.name))
    monkeypatch.setattr(os, "listdir", None)  # nor is the folder looked through
    monkeypatch.setattr("pathlib.Path.iterdir", None)
    for number in (2, 3):
        tracker.log(make_round([make_sample(number)], number))
    assert written == ["step_00000002.js", "steps.js", "step_00000003.js", "steps.js"]


def test_a_late_step_takes_its_place(directory):
    write_rounds(described_run(directory), {20: [{}], 10: [{}]})
    assert index(directory)["steps"] == [10, 20]


def test_a_repeated_step_replaces_its_data(directory):
    write_rounds(described_run(directory), {20: [{"generation": "first"}]})
    write_rounds(described_run(directory), {20: [{"generation": "second"}]})
    assert [answer["generation"] for answer in step(directory, 20)["answers"]] == ["second"]
    assert index(directory)["steps"] == [20]


def test_a_resumed_run_goes_on_and_what_was_put_aside_is_gone(directory):
    write_rounds(described_run(directory), {10: [{}], 20: [{"generation": "aside"}], 30: [{}]})
    before = data_files(directory)
    assert set_aside(directory, 10) == directory / "old-1"
    assert list(data_files(directory)) == ["step_00000010.js", "steps.js"]
    assert index(directory)["steps"] == [10]
    write_rounds(described_run(directory), {20: [{"generation": "anew"}]})
    assert index(directory)["steps"] == [10, 20]
    assert data_files(directory)["step_00000010.js"] == before["step_00000010.js"]
    assert step(directory, 20)["answers"][0]["generation"] == "anew"
    make_page(Folder(directory / "old-1"))
    assert index(directory / "old-1")["steps"] == [20, 30]
    assert index(directory / "old-1")["folder"] == "checkpoints/generations/old-1"
    assert data_files(directory / "old-1")["step_00000020.js"] == before["step_00000020.js"]


def test_a_new_run_leaves_the_earlier_page_with_its_samples(directory):
    write_rounds(described_run(directory), {10: [{}]})
    before = data_files(directory)
    assert set_aside(directory, 0) == directory / "old-1"
    assert sorted(os.listdir(directory)) == ["old-1"]
    assert data_files(directory / "old-1") == before
    assert (directory / "old-1" / "index.html").exists()


def test_rounds_of_a_time_without_a_page_are_made_up_for(directory):
    write_rounds(described_run(directory), {10: [{}], 20: [{"generation": "first"}]})
    write_rounds(described_run(directory, page=False), {20: [{"generation": "second"}], 30: [{}]})
    later = (directory / "data" / "step_00000020.js").stat().st_mtime + 60
    os.utime(directory / "step_00000020.jsonl", (later, later))
    write_rounds(described_run(directory), {40: [{}]})
    assert index(directory)["steps"] == [10, 20, 30, 40]
    assert step(directory, 20)["answers"][0]["generation"] == "second"
    live = data_files(directory)
    shutil.rmtree(directory / "data")
    make_page(Folder(directory))
    assert data_files(directory) == live


def test_data_of_steps_without_a_file_goes(directory):
    write_rounds(described_run(directory), {10: [{}], 20: [{}]})
    (directory / "step_00000010.jsonl").unlink()
    (directory / "data" / "mine.js").write_text("//")
    write_rounds(described_run(directory), {30: [{}]})
    assert index(directory)["steps"] == [20, 30]
    assert list(data_files(directory)) == ["mine.js", "step_00000020.js", "step_00000030.js", "steps.js"]


def test_data_that_is_right_is_not_made_again(directory, monkeypatch):
    write_rounds(described_run(directory), {10: [{}], 20: [{}]})
    (directory / "data" / "step_00000020.js").write_bytes(b'valgen.step({"format":0,"run":0,"step":20,')
    made = []
    monkeypatch.setattr(writing, "step_of", lambda folder, step: made.append(step))
    PageTracker(described_run(directory)).log(make_round([make_sample(30)], 30))
    assert made == [20]


def test_a_round_after_a_failed_one_makes_up_for_it(directory, monkeypatch):
    tracker = PageTracker(described_run(directory))
    tracker.log(make_round([make_sample(10)], 10))

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        tracker.log(make_round([make_sample(20)], 20))
    monkeypatch.undo()
    write_rounds(described_run(directory, page=False), {10: [{}], 20: [{}]})
    tracker.log(make_round([make_sample(30)], 30))
    assert index(directory)["steps"] == [10, 20, 30]


def test_a_round_that_comes_while_the_page_is_made_anew_stays_in_it(directory, monkeypatch):
    run = described_run(directory)
    write_rounds(run, {30: [{}]})

    def while_a_run_goes_on(*args):
        monkeypatch.undo()
        write_rounds(run, {60: [{}]})
        writing.write_step(*args)

    monkeypatch.setattr(writing, "write_step", while_a_run_goes_on)
    make_page(Folder(directory))
    assert index(directory)["steps"] == [30, 60]


def test_two_that_write_the_page_at_once_do_not_meet(tmp_path, monkeypatch):
    path = tmp_path / "steps.js"
    sync = os.fsync

    def another_process(descriptor):
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        write_whole(path, b"another")

    monkeypatch.setattr(os, "fsync", another_process)
    write_whole(path, b"one")
    assert path.read_bytes() == b"one"
    assert [file.name for file in tmp_path.iterdir()] == ["steps.js"]


def test_a_removed_folder_is_made_again(directory):
    tracker = PageTracker(described_run(directory))
    tracker.log(make_round([make_sample(10)], 10))
    shutil.rmtree(directory)
    tracker.log(make_round([make_sample(20)], 20))
    assert (directory / "index.html").exists()
    assert index(directory)["steps"] == [20]


def test_no_page_where_none_is_wanted(directory):
    write_rounds(described_run(directory, page=False), {10: [{}]})
    assert sorted(path.name for path in directory.iterdir() if path.suffix not in (".json", ".jsonl")) == []
