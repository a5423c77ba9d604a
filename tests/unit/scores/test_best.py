"""The best value over rounds and runs."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from verl_valgen.records import GroupNumbers, RoundNumbers
from verl_valgen.scores.best import Best


def best(directory, mode="max", metric="right", start_step=0):
    return Best(directory, metric, mode, start_step)


def update(keeper, values, step):
    """What a round's numbers say of the best."""
    numbers = keeper.update(RoundNumbers(1, 1.0, 1.0, GroupNumbers(scores=values)), step).flat()
    return {name: numbers[name] for name in ("best", "best_step") if name in numbers}


def rounds(keeper, *values):
    """What each round's numbers say of the best, for pairs of step and value; each is written."""
    found = []
    for step, value in values:
        found.append(update(keeper, {keeper.metric: value}, step))
        keeper.write()
    return found


@pytest.mark.parametrize(
    ("mode", "expected"), [("max", [(1, 1), (1, 1), (3, 3)]), ("min", [(1, 1), (0.5, 2), (0.5, 2)])]
)
def test_it_is_kept_with_its_step(tmp_path, mode, expected):
    keeper = best(tmp_path / "generations", mode)
    found = rounds(keeper, (1, 1.0), (2, 0.5), (3, 3.0))
    assert found == [{"best": value, "best_step": step} for value, step in expected]
    *before, best_one = [{"value": value, "step": step} for value, step in dict.fromkeys(expected)]
    record = {"metric": "right", "mode": mode, **best_one, "before": before}
    assert json.loads((tmp_path / "generations" / "best.json").read_text()) == record


def test_of_equal_values_the_first_is_the_best(tmp_path):
    keeper = best(tmp_path)
    assert [update(keeper, {"right": 1.0}, step)["best_step"] for step in (1, 2)] == [1, 1]


def test_a_resumed_run_goes_on_from_it(tmp_path):
    rounds(best(tmp_path), (10, 2.0))
    assert rounds(best(tmp_path, start_step=10), (11, 1.0)) == [{"best": 2.0, "best_step": 10}]


def test_a_run_resumed_before_it_goes_on_from_the_best_until_then(tmp_path):
    rounds(best(tmp_path), (2, 1.0), (4, 0.5), (6, 3.0), (8, 4.0))
    resumed = best(tmp_path, start_step=5)
    assert rounds(resumed, (6, 0.9)) == [{"best": 1.0, "best_step": 2}]
    # The file says so too, or a run that is resumed once more would have the better value of a round that is no more.
    assert rounds(best(tmp_path, start_step=9), (10, 0.0)) == [{"best": 1.0, "best_step": 2}]
    assert rounds(resumed, (7, 2.0)) == [{"best": 2.0, "best_step": 7}]
    assert json.loads((tmp_path / "best.json").read_text())["before"] == [{"value": 1.0, "step": 2}]


def test_a_run_resumed_before_all_of_them_has_none(tmp_path):
    rounds(best(tmp_path), (6, 3.0))
    assert rounds(best(tmp_path, start_step=5), (6, float("nan"))) == [{}]
    assert not (tmp_path / "best.json").exists()


@pytest.mark.parametrize("other", [{"start_step": 9}, {"metric": "f1"}, {"mode": "min"}], ids=str)
def test_another_runs_is_not_taken_over(tmp_path, other):
    rounds(best(tmp_path), (10, 2.0))
    assert update(best(tmp_path, **({"start_step": 10} | other)), {"right": 1.0, "f1": 1.0}, 11) == {
        "best": 1.0,
        "best_step": 11,
    }


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"metric": "right"}', '{"metric": "right", "mode": "max", "value": []}']
)
def test_a_broken_file_is_as_none(tmp_path, content):
    (tmp_path / "best.json").write_text(content)
    assert update(best(tmp_path), {"right": 1.0}, 1) == {"best": 1.0, "best_step": 1}


def test_a_round_without_it_is_said_once_and_nan_is_never_the_best(tmp_path, caplog):
    keeper = best(tmp_path)
    with caplog.at_level(logging.WARNING, "verl_valgen"):
        assert [update(keeper, {"empty": 0.0}, step) for step in (1, 2)] == [{}, {}]
    (message,) = caplog.messages
    assert message.startswith("generation.best_metric: this round has no right; there are ")
    assert message.endswith("num_samples, seconds, tokens_per_s, empty")
    assert rounds(keeper, (3, float("nan"))) == [{}]
    assert not (tmp_path / "best.json").exists()


def test_it_may_be_a_number_that_is_not_logged(tmp_path, caplog):
    keeper = best(tmp_path, metric="nucleus/right_best")
    group = GroupNumbers(scores={"right": 0.5}, further={"right_best": 1.0})
    numbers = keeper.update(RoundNumbers(1, 1.0, 1.0, by_strategy={"nucleus": group}), 1).flat()
    assert (numbers["best"], numbers["best_step"]) == (1.0, 1)
    assert "nucleus/right_best" not in numbers
    # Where a round lacks it, the few that are logged are named.
    keeper.update(RoundNumbers(1, 1.0, 1.0, by_strategy={"nucleus": replace(group, further={"right_worst": 0})}), 2)
    assert caplog.messages[0].endswith("; there are num_samples, seconds, tokens_per_s, nucleus/right")


def test_a_new_run_takes_nothing_over(tmp_path):
    rounds(best(tmp_path), (0, 2.0))
    assert rounds(best(tmp_path), (0, 1.0)) == [{"best": 1.0, "best_step": 0}]


def test_it_starts_anew_where_the_prompts_are_others(tmp_path):
    rounds(Best(tmp_path, "right", "max", 0, "some"), (10, 2.0))
    assert json.loads((tmp_path / "best.json").read_text())["prompts"] == "some"
    assert rounds(Best(tmp_path, "right", "max", 10, "some"), (11, 1.0)) == [{"best": 2.0, "best_step": 10}]
    assert rounds(Best(tmp_path, "right", "max", 11, "others"), (12, 1.0)) == [{"best": 1.0, "best_step": 12}]
    assert json.loads((tmp_path / "best.json").read_text())["before"] == []


def test_a_file_that_does_not_say_its_prompts_is_gone_on_from(tmp_path):
    rounds(best(tmp_path), (10, 2.0))
    assert rounds(Best(tmp_path, "right", "max", 10, "some"), (11, 1.0)) == [{"best": 2.0, "best_step": 10}]
