"""The numbers of a round against definitions that take longer."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_valgen.records import Sample
from verl_valgen.scores.aggregates import distinct_2, majority, pass_at_k, repeated_ngram, round_scalars, source_key
from verl_valgen.scores.names import ALWAYS
from verl_valgen.scores.scoring import Verdict


def sample(index: int = 0, completion: int = 0, strategy: str = "default", **others: Any) -> Sample:
    defaults: dict[str, Any] = {
        "step": 1, "row": index, "prompt": "", "prompt_text": "", "generation": "text", "reference": None,
        "finish_reason": "eos", "num_prompt_tokens": 3, "num_new_tokens": 4, "seed": 0, "output_ids": [1, 2, 3, 4],
    }  # fmt: skip
    return Sample(index=index, completion=completion, strategy=strategy, **(defaults | others))


def verdict(score: float, vote: str = "", is_correctness: bool | None = None) -> Verdict:
    return Verdict({"right": score}, is_correctness, vote)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(numbers):
    n, c, k = numbers
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@given(st.lists(st.integers(0, 3), max_size=14))
def test_repeated_ngram_is_the_longest_run_that_occurs_twice(ids):
    lengths = [
        length
        for length in range(1, len(ids))
        if len({tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)}) < len(ids) - length + 1
    ]
    assert repeated_ngram(ids) == (max(lengths, default=0) / len(ids) if ids else 0.0)


def test_repeated_ngram_of_token_ids_that_are_surrogates():
    assert repeated_ngram([0xD800, 0xDC00, 0xD800, 0xDC00]) == 0.5


def test_distinct_2():
    assert distinct_2([[1, 2, 1, 2], [1, 2]]) == 2 / 4
    assert distinct_2([[1], []]) == 1.0


def test_the_majority_wins_and_of_equals_the_first():
    answers = [verdict(0.0, "a"), verdict(1.0, "b"), verdict(1.0, "b")]
    assert majority(answers, "right") == 1.0
    assert majority(answers[:2], "right") == 0.0


def test_what_is_always_told():
    scored = [
        (sample(0, finish_reason="length", output_ids=[5, 5, 5, 5]), {}),
        (sample(1, generation=" \n", num_new_tokens=1, output_ids=[6]), {}),
    ]
    found = round_scalars(scored, seconds=2.0, num_tokens=5)
    assert found == {
        "num_samples": 2, "seconds": 2.0, "tokens_per_s": 2.5,
        "num_new_tokens": 2.5, "cut_off": 0.5, "empty": 0.5, "distinct_2": 1 / 3, "repeated_ngram": 0.375,
    }  # fmt: skip
    assert set(ALWAYS) < found.keys()


def test_of_several_completions_best_worst_pass_at_k_and_majority():
    scores = {0: [(0, "a"), (1, "b"), (0, "a")], 1: [(1, "x"), (1, "y"), (0, "z")]}
    scored = [
        (sample(index, completion), {"right": verdict(score, vote)})
        for index, of_prompt in scores.items()
        for completion, (score, vote) in enumerate(of_prompt)
    ]
    found = round_scalars(scored, 1.0, 1)
    assert {key: value for key, value in found.items() if key.startswith("right")} == pytest.approx(
        {
            "right": 0.5, "right_best": 1.0, "right_worst": 0.0, "right_pass_at_1": 0.5,
            "right_pass_at_2": (2 / 3 + 1.0) / 2, "right_pass_at_3": 1.0, "right_majority": 0.5,
        }
    )  # fmt: skip


@pytest.mark.parametrize(("score", "is_correctness"), [(0.5, None), (1.0, False)])
def test_what_is_no_correctness_has_no_pass_at_k(score, is_correctness):
    scored = [(sample(0, i), {"right": verdict(score, "", is_correctness)}) for i in range(2)]
    found = round_scalars(scored, 1.0, 1)
    assert {key for key in found if key.startswith("right")} == {"right", "right_best", "right_worst"}


def test_pass_at_k_is_of_the_prompts_that_have_so_many():
    scored = [(sample(0, i), {"right": verdict(float(i == 0))}) for i in range(4)]
    scored += [(sample(1), {"right": verdict(1.0)})]
    found = round_scalars(scored, 1.0, 1)
    assert {key: value for key, value in found.items() if "_pass_at_" in key} == {
        "right_pass_at_1": (0.25 + 1.0) / 2, "right_pass_at_2": 0.5, "right_pass_at_4": 1.0,
    }  # fmt: skip


def test_a_score_of_its_own_goes_before_a_derived_one():
    scored = [(sample(0, i), {"f": Verdict({"f": i, "f_best": 7.0}, False, "")}) for i in range(2)]
    found = round_scalars(scored, 1.0, 1)
    assert (found["f_best"], found["f_worst"]) == (7.0, 0.0)


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


def test_by_strategy_and_by_source():
    scored = [
        (sample(0, strategy="greedy", data_source="openai/gsm8k"), {"right": verdict(1.0)}),
        (sample(0, strategy="hot", data_source="openai/gsm8k"), {"right": verdict(0.0)}),
        (sample(1, strategy="greedy", data_source="x"), {"right": verdict(1.0)}),
        (sample(1, strategy="hot"), {"right": verdict(1.0)}),
    ]
    found = round_scalars(scored, 1.0, 1)
    assert {key: value for key, value in found.items() if key.endswith("right")} == {
        "right": 0.75, "greedy/right": 1.0, "hot/right": 0.5,
        "by_source/openai/gsm8k/right": 0.5, "by_source/x/right": 1.0,
    }  # fmt: skip
    assert "greedy/num_new_tokens" in found
    assert "right_best" not in found  # no strategy answers twice


def test_many_sources_do_not_fill_the_tracker():
    found = round_scalars([(sample(i, data_source=f"s{i}"), {}) for i in range(100)], 1.0, 1)
    assert len({key.split("/")[1] for key in found if key.startswith("by_source/")}) == 32


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
    found = round_scalars([(sample(0, 0), {"m": both}), (sample(0, 1), {"m": one})], 1.0, 1)
    assert (found["m"], found["m_pass_at_2"], found["m_acc"]) == (0.5, 1.0, 1.0)
    assert "m_acc_pass_at_2" not in found


def test_different_sources_have_different_keys():
    assert len({source_key(source) for source in ("数学", "代码", "a" * 70, "a" * 71, "x", "x/", "")}) == 7
    assert source_key("openai/gsm8k") == "openai/gsm8k"
