"""What every tracker must do, checked on real runs that are read back."""

from __future__ import annotations

import math

import pytest
from destinations import Destination, Recorded, make_round, make_sample

from verl_valgen.text import truncate

HOSTILE_TEXTS = [
    "",
    "日本語 naïve 😀👩‍👩‍👧",
    "007",
    "2021-01-01",
    "1e5",
    "NaN",
    "<script>alert(1)</script>",
    "[bold]x[/bold] %s {} \\nabla",
    "\"double\" 'single' `back`, comma; =1+1",
    "line\nline\r\nline\rline\ttab\u2028end",
    "x" * 100_000,
    "lone\rreturn",
    "lone \ud83d surrogate",
    "\x1b[2J\x1b[31mred\x07 \u202e",
    "nul \x00 byte",
    "--x_x--0_0-",
]

ODD_NAMES = ["-", "_", "0", "007", "nan", "None", "Exact", "index", "prompt", "_step", "a" * 64, "数学"]
"""What functions and strategies may be called; a strategy in ASCII alone."""


def test_text_comes_back_whole(destination: Destination):
    samples = [
        make_sample(index=i, prompt=text, prompt_text=text, generation=text, reference=text)
        for i, text in enumerate(HOSTILE_TEXTS)
    ]
    destination.tracker.log(make_round(samples, 1))
    found = destination.read()[1]

    expected = [destination.shown(text) for text in HOSTILE_TEXTS]
    assert [row["generation"] for row in found.rows] == expected
    for column in ("prompt_text", "prompt", "reference") if destination.has_table else ("prompt_text",):
        assert [row[column] for row in found.rows] == expected
    if destination.has_texts:
        for i, text in enumerate(HOSTILE_TEXTS, start=1):
            cut = destination.shown(truncate(text, destination.max_text_chars))
            assert found.values[f"val/sample_{i}_prompt"] == cut
            assert found.values[f"val/sample_{i}_generation"] == cut


def test_number_of_samples_may_change(destination: Destination):
    for step, num_samples in [(1, 2), (2, 5), (3, 1), (4, 0)]:
        destination.tracker.log(make_round([make_sample(step, i) for i in range(num_samples)], step))
    rounds = destination.read()
    for step, num_samples in [(1, 2), (2, 5), (3, 1)]:
        assert [row["generation"] for row in rounds[step].rows] == [f"answer {i} at {step}" for i in range(num_samples)]


def test_fields_and_scores_stand_in_the_table(destination: Destination):
    """Columns may change from step to step, and a score or a reference may be missing."""
    destination.tracker.log(make_round([make_sample(1, 0, reference=None)], 1))
    second_round = [
        make_sample(2, 0, scores={"exact": 1.0, "overlap": None}, reference=None),
        make_sample(2, 1, row=None, scores={"exact": 0.25, "bleu": 0.5}, finish_reason="length", strategy="greedy"),
        make_sample(2, 2, row=7, data_source="sums"),
    ]
    destination.tracker.log(make_round(second_round, 2))
    destination.tracker.log(make_round([make_sample(3, 0, scores={"exact": math.nan, "other": 2.5})], 3))
    rounds = destination.read()
    if not destination.has_table:
        assert [len(rounds[step].rows) for step in (1, 2, 3)] == [1, 3, 1]
        return

    cell = destination.cell
    assert rounds[1].rows[0]["reference"] in (cell(None), "")  # the first file of a folder has room for later texts
    first, second, third = rounds[2].rows
    for column, value in [("step", 2), ("index", 0), ("strategy", "default"), ("completion", 0), ("reference", None)]:
        assert first[column] == cell(value)
    for column, value in [("index", 1), ("strategy", "greedy"), ("finish_reason", "length"), ("num_new_tokens", 4)]:
        assert second[column] == cell(value)
    assert (second["row"], second["data_source"]) == (cell(None), cell(None))
    assert (third["row"], third["data_source"]) == (cell(7), "sums")
    assert (first["exact"], first["overlap"], first.get("bleu")) in [(1.0, None, None), ("1.0", "", "")]
    assert (second["exact"], second.get("overlap"), second["bleu"]) in [(0.25, None, 0.5), ("0.25", "", "0.5")]
    assert (rounds[3].rows[0]["exact"], rounds[3].rows[0]["other"]) in [(None, 2.5), ("", "2.5")]


def test_scalars_are_recorded_under_their_keys(any_destination: Destination):
    """Also under names that are odd and allowed: of functions, and of strategies."""
    destination = any_destination
    odd = {name: float(number) for number, name in enumerate(ODD_NAMES)}
    scores, by_source = {"exact": 0.5, "num_new_tokens": 17.0, **odd}, {"openai/gsm8k": {"exact": 1.0}}
    by_strategy = {name: {"exact": number} for name, number in odd.items() if name.isascii()}
    scalars = {
        "val/gen/by_source/openai/gsm8k/exact": 1.0,
        **{f"val/gen/{name}": number for name, number in scores.items()},
        **{f"val/gen/{strategy}/exact": numbers["exact"] for strategy, numbers in by_strategy.items()},
    }
    for step in (1, 2):
        of_round = make_round(
            [make_sample(step, scores=odd)], step, scores=scores, by_source=by_source, by_strategy=by_strategy
        )
        destination.tracker.log(of_round)
    rounds = destination.read()
    for step in (1, 2):
        assert len(rounds[step].rows) == destination.has_samples
        if destination.has_samples and destination.has_table:
            (row,) = rounds[step].rows
            assert {name: float(row.get(f"score_{name}", row.get(name))) for name in odd} == odd
        if destination.has_scalars:
            assert {key: rounds[step].values[key] for key in scalars} == scalars


def test_late_rounds_are_found_again_under_their_own_steps(any_destination: Destination):
    """A round may end when the trainer is steps ahead; where it is filed is the destination's affair."""
    destination = any_destination
    steps = (30, 10, 20, 40, 25)
    for step in steps:
        samples = [make_sample(step, index) for index in range(step // 10)]
        destination.tracker.log(make_round(samples, step, scores={"exact": step / 100}))
    destination.tracker.close()
    found = own_steps(destination)
    assert set(steps) <= set(found)
    for step in steps:
        answers = [f"answer {i} at {step}" for i in range(step // 10)]
        if destination.has_samples:
            assert [row["generation"] for row in found[step].rows] == answers
        if destination.has_scalars:
            assert found[step].values["val/gen/exact"] == pytest.approx(step / 100)  # some keep 32 bits
        if destination.has_texts and (destination.keeps_texts_of_all_steps or step == max(steps)):
            texts = {key: text for key, text in found[step].values.items() if key.endswith("_generation")}
            assert texts == {f"val/sample_{i + 1}_generation": answer for i, answer in enumerate(answers)}


def test_of_a_repeated_round_is_kept_what_is_declared(any_destination: Destination):
    """A validation that is repeated, after another: which of the two is found is the destination's affair."""
    destination = any_destination
    for step, text, score in [(10, "first", 0.25), (20, "between", 0.5), (10, "second", 0.75)]:
        destination.tracker.log(make_round([make_sample(step, generation=text)], step, scores={"exact": score}))
    destination.tracker.close()
    if destination.keeps_repeated_in_one_place:
        with pytest.raises(AssertionError, match="stands twice"):
            destination.read()
        return
    rounds = destination.read()
    if destination.has_samples:
        texts = [row["generation"] for found in rounds.values() for row in found.rows]
        assert "between" in texts
        assert {"first", "second"}.intersection(texts) == set(destination.kept_of_repeated)
    if destination.has_scalars:
        scores = [found.values["val/gen/exact"] for found in rounds.values() if "val/gen/exact" in found.values]
        assert 0.5 in scores
        assert {0.25, 0.75}.intersection(scores)


def own_steps(destination: Destination) -> dict[int, Recorded]:
    """What it holds, by the steps of the rounds, each of which stands in one place."""
    filed = destination.read()
    by_step = [(found.values.get("val/samples_step", step), found) for step, found in filed.items()]
    rounds = [(step, found) for step, found in by_step if found.rows or found.values]
    assert len(rounds) == len(dict(rounds))
    return dict(rounds)


@pytest.mark.parametrize("order", [1, -1])
def test_keys_per_sample_hold_the_first_answer_of_each_prompt(destination: Destination, order: int):
    samples = [
        make_sample(index=index, completion=completion, strategy=strategy, generation=f"{strategy} {completion}")
        for index in (0, 1)[::order]
        for strategy, completion in [("default", 0), ("default", 1), ("b", 0)]
    ]
    destination.tracker.log(make_round(samples, 1))
    if destination.has_texts:
        found = destination.read()[1]
        assert not destination.has_table or len(found.rows) == 6
        generations = {key: value for key, value in found.values.items() if key.endswith("_generation")}
        assert generations == {"val/sample_1_generation": "default 0", "val/sample_2_generation": "default 0"}
        assert found.values["val/sample_2_prompt"] == "question 1"
