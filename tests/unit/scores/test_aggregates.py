"""The numbers of a round against definitions that take longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_valgen.records import Sample, Verdict
from verl_valgen.scores.aggregates import distinct_2, majority, pass_at_k, seq_rep_4, source_key, summarize_round
from verl_valgen.scores.names import ALWAYS, FURTHER


def sample(index: int = 0, completion: int = 0, strategy: str = "default", **others: Any) -> Sample:
    defaults: dict[str, Any] = {
        "step": 1, "row": index, "prompt": "", "prompt_text": "", "generation": "text", "reference": None,
        "finish_reason": "eos", "num_prompt_tokens": 3, "num_new_tokens": 4, "seed": 0, "output_ids": [1, 2, 3, 4],
    }  # fmt: skip
    return Sample(index=index, completion=completion, strategy=strategy, **(defaults | others))


def round_scalars(
    judged: Sequence[tuple[Sample, Mapping[str, Verdict]]], seconds: float = 1.0, num_tokens: int = 1, **others: Any
) -> dict[str, float]:
    """The numbers of a round that are logged, by key, of samples and their verdicts: all of them, or the main ones."""
    samples = [replace(one, verdicts=own) for one, own in judged]
    return summarize_round(samples, seconds, num_tokens, **{"logs_all": True, **others}).flat()


def verdict(score: float, vote: str = "", is_correctness: bool | None = None) -> Verdict:
    return Verdict({"right": score}, is_correctness, vote)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(numbers):
    n, c, k = numbers
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@given(st.lists(st.integers(0, 2), max_size=14))
def test_seq_rep_4_is_the_share_of_runs_of_four_that_occurred_before(ids):
    runs = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    num_repeated = sum(run in runs[:i] for i, run in enumerate(runs))
    assert seq_rep_4(ids) == pytest.approx(num_repeated / len(runs) if runs else 0.0)


def test_distinct_2():
    assert distinct_2([[1, 2, 1, 2], [1, 2]]) == 2 / 4
    assert distinct_2([[1], []]) == 1.0


def test_the_majority_wins_and_of_equals_the_first():
    answers = [verdict(0.0, "a"), verdict(1.0, "b"), verdict(1.0, "b")]
    assert majority(answers, "right") == 1.0
    assert majority(answers[:2], "right") == 0.0


def test_what_is_always_told():
    scored = [
        (sample(0, finish_reason="length", output_ids=[5, 5, 5, 5, 5]), {}),
        (sample(1, generation=" \n", num_new_tokens=1, output_ids=[6]), {}),
    ]
    found = round_scalars(scored, seconds=2.0, num_tokens=5)
    assert found == {
        "num_samples": 2, "seconds": 2.0, "tokens_per_s": 2.5,
        "num_new_tokens": 2.5, "cut_off": 0.5, "empty": 0.5, "distinct_2": 1 / 4, "seq_rep_4": 0.25,
    }  # fmt: skip
    assert {*ALWAYS, *FURTHER} - found.keys() == {"mean_logprob"}  # best_of alone asks for it
    main = round_scalars(scored, seconds=2.0, num_tokens=5, logs_all=False)
    assert found.keys() - main.keys() == {"distinct_2", "seq_rep_4"}
    assert main.items() < found.items()


def test_of_several_completions_best_worst_pass_at_k_and_majority():
    scores = {0: [(0, "a"), (1, "b"), (0, "a")], 1: [(1, "x"), (1, "y"), (0, "z")]}
    scored = [
        (sample(index, completion), {"right": verdict(score, vote)})
        for index, of_prompt in scores.items()
        for completion, (score, vote) in enumerate(of_prompt)
    ]
    found = round_scalars(scored, n=3)
    assert {key: value for key, value in found.items() if key.startswith("right")} == pytest.approx(
        {
            "right": 0.5, "right_best": 1.0, "right_worst": 0.0, "right_pass_at_1": 0.5,
            "right_pass_at_2": (2 / 3 + 1.0) / 2, "right_pass_at_3": 1.0, "right_majority": 0.5,
        }
    )  # fmt: skip
    main = round_scalars(scored, n=3, logs_all=False)
    assert {key for key in main if key.startswith("right")} == {"right", "right_pass_at_3", "right_majority"}


@pytest.mark.parametrize(("score", "is_correctness"), [(0.5, None), (1.0, False)])
def test_what_is_no_correctness_has_no_pass_at_k(score, is_correctness):
    scored = [(sample(0, i), {"right": verdict(score, "", is_correctness)}) for i in range(2)]
    found = round_scalars(scored, n=2)
    assert {key for key in found if key.startswith("right")} == {"right", "right_best", "right_worst"}


def test_pass_at_k_is_of_the_prompts_that_have_so_many():
    scored = [(sample(0, i), {"right": verdict(float(i == 0))}) for i in range(4)]
    scored += [(sample(1), {"right": verdict(1.0)})]
    found = round_scalars(scored, n=4)
    assert {key: value for key, value in found.items() if "_pass_at_" in key} == {
        "right_pass_at_1": (0.25 + 1.0) / 2, "right_pass_at_2": 0.5, "right_pass_at_4": 1.0,
    }  # fmt: skip


def test_where_time_lost_completions_pass_at_n_is_not_of_fewer():
    """Of three that came of four, pass@3 would be another number under another key, in this round alone."""
    scored = [(sample(0, i), {"right": verdict(float(i == 0))}) for i in range(3)]
    assert {key for key in round_scalars(scored, n=4) if key.startswith("right")} == {
        "right", "right_best", "right_worst", "right_pass_at_1", "right_pass_at_2", "right_majority",
    }  # fmt: skip
    assert "right_pass_at_3" not in round_scalars(scored, n=4, logs_all=False)


def test_a_prompt_that_answers_once_whatever_n_is_has_no_pass_at_n():
    scored = [(sample(i, strategy="greedy"), {"right": verdict(1.0)}) for i in range(2)]
    found = round_scalars(scored, n=4, strategies=["greedy"])
    assert {key for key in found if "right" in key} == {"greedy/right"}


@pytest.mark.parametrize("same_metric", [True, False])
def test_a_score_of_its_own_goes_before_a_derived_one(same_metric):
    both = {"f": Verdict({"f": 1.0, "f_majority": 7.0}, None, "")}
    two = {"f": Verdict({"f": 1.0}, None, ""), "f_majority": Verdict({"f_majority": 7.0}, False, "")}
    found = round_scalars([(sample(0, i), both if same_metric else two) for i in range(2)], n=2)
    assert (found["f_majority"], found["f_worst"], found["f_pass_at_2"]) == (7.0, 1.0, 1.0)


def test_answers_that_were_not_begun_count_for_nothing():
    unbegun = sample(0, generation="", num_new_tokens=0, output_ids=[], finish_reason="time")
    begun = sample(1, generation="a", num_new_tokens=1, output_ids=[5], finish_reason="time")
    found = round_scalars([(unbegun, {"right": verdict(0.0)}), (begun, {"right": verdict(1.0)})], 1.0, 1)
    assert (found["num_samples"], found["num_new_tokens"], found["empty"], found["right"]) == (2, 1.0, 0.0, 1.0)
    none = round_scalars([(unbegun, {})], 1.0, 0)
    assert none == {"num_samples": 1.0, "seconds": 1.0, "tokens_per_s": 0.0}


def test_a_missing_score_is_not_a_zero():
    scored = [(sample(0), {"right": verdict(1.0)}), (sample(1), {}), (sample(2), {"right": Verdict({}, True, "")})]
    assert round_scalars(scored, 1.0, 1)["right"] == 1.0
    assert "right" not in round_scalars(scored[1:], 1.0, 1)


def of_two_strategies() -> list[tuple[Sample, dict[str, Verdict]]]:
    return [
        (sample(0, strategy="greedy", data_source="openai/gsm8k"), {"right": verdict(1.0)}),
        (sample(0, strategy="hot", data_source="openai/gsm8k"), {"right": verdict(0.0)}),
        (sample(1, strategy="greedy", data_source="x"), {"right": verdict(1.0)}),
        (sample(1, strategy="hot"), {"right": verdict(1.0)}),
    ]


def test_by_strategy_and_by_source():
    main = round_scalars(of_two_strategies(), strategies=["greedy", "hot"], logs_all=False)
    assert {key: value for key, value in main.items() if key.endswith("right")} == {
        "greedy/right": 1.0, "hot/right": 0.5, "by_source/openai/gsm8k/right": 1.0, "by_source/x/right": 1.0,
    }  # fmt: skip
    assert {key for key in main if "right" not in key} == {
        "num_samples", "seconds", "tokens_per_s", *(f"{name}/{key}" for name in ("greedy", "hot") for key in ALWAYS),
    }  # fmt: skip
    found = round_scalars(of_two_strategies(), strategies=["greedy", "hot"])
    assert main.items() < found.items()
    assert {"hot/seq_rep_4", "by_source/x/num_new_tokens", "by_source/x/distinct_2"} < found.keys()


def test_no_number_mixes_strategies():
    """Whichever of them answered: a single one, one that is called as answers without strategies are, a late one."""
    for strategies in (["greedy", "hot"], ["hot", "greedy"], ["default"]):
        answered = [(replace(one, strategy=strategies[-1]), own) for one, own in of_two_strategies()]
        found = round_scalars(answered, strategies=strategies)
        assert {key.split("/")[0] for key in found if "right" in key} <= {*strategies, "by_source"}
        assert any(key.startswith("by_source/") for key in found) == (len(strategies) == 1)


def of_rows_and_own_prompts() -> list[tuple[Sample, dict[str, Verdict]]]:
    return [
        (sample(0, data_source="x"), {"right": verdict(1.0)}),
        (sample(1), {"right": verdict(1.0)}),  # a row whose data has no sources
        (sample(2, data_source="prompts"), {"right": verdict(1.0)}),
        (sample(3, row=None), {"right": verdict(0.0)}),
        (sample(4, row=None, data_source="x"), {"right": verdict(0.0)}),
    ]


def test_own_prompts_are_a_source_beside_others():
    found = round_scalars(of_rows_and_own_prompts(), logs_all=False)
    assert {key: value for key, value in found.items() if key.startswith("by_source/")} == {
        "by_source/prompts/right": 0.0, f"by_source/{source_key('prompts')}/right": 1.0, "by_source/x/right": 0.5,
    }  # fmt: skip
    assert source_key("prompts") != "prompts"
    assert not any(key.startswith("by_source/") for key in round_scalars(of_rows_and_own_prompts()[3:4]))


def test_own_prompts_stay_a_source_where_time_was_up_before_all_others():
    late = {"finish_reason": "time", "num_new_tokens": 0}
    scored = [(sample(0, **late), {}), (sample(1, row=None), {"right": verdict(1.0)})]
    assert round_scalars(scored)["by_source/prompts/right"] == 1.0


def test_many_sources_do_not_fill_the_tracker():
    scored = [(sample(i, data_source=f"s{i}"), {}) for i in range(100)]
    scored.append((sample(100, row=None), {}))
    unbegun = [(replace(one, finish_reason="time", num_new_tokens=0), own) for one, own in scored[:10]]
    sources = [
        {key.split("/")[1] for key in round_scalars(of_round) if key.startswith("by_source/")}
        for of_round in (scored, unbegun + scored[10:])
    ]
    assert sources[0] == {*(f"s{i}" for i in range(32)), "prompts"}
    assert sources[1] == sources[0] - {f"s{i}" for i in range(10)}  # no other sources take their place for a round


@given(st.text())
def test_any_source_makes_a_key(source):
    key = source_key(source)
    assert key
    assert len(key) <= 64
    assert all(part.strip(".") for part in key.split("/"))
    assert set(key) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./-")


def test_a_score_that_is_no_number_counts_for_nothing():
    scored = [(sample(0), {"right": verdict(1.0)}), (sample(1), {"right": verdict(float("nan"))})]
    assert round_scalars(scored, 1.0, 1)["right"] == 1.0
    assert "right" not in round_scalars(scored[1:], 1.0, 1)
    unlikely = sample(0, scores={"mean_logprob": float("-inf")})
    assert "mean_logprob" not in round_scalars([(unlikely, {})], 1.0, 1)


def test_a_score_that_some_completions_lack():
    both, one = Verdict({"m": 1.0, "m_acc": 1.0}, None, ""), Verdict({"m": 0.0}, None, "")
    found = round_scalars([(sample(0, 0), {"m": both}), (sample(0, 1), {"m": one})], n=2)
    assert (found["m"], found["m_pass_at_2"], found["m_acc"]) == (0.5, 1.0, 1.0)
    assert "m_acc_pass_at_2" not in found


def test_different_sources_have_different_keys():
    assert (
        len(
            {source_key(source) for source in ("数学", "代码", "a" * 70, "a" * 71, "x", "x/", "", "prompts")}
            | {"prompts"}
        )
        == 9
    )
    assert source_key("openai/gsm8k") == "openai/gsm8k"
