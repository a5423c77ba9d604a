"""A round in numbers, for terminals of any width."""

from __future__ import annotations

from typing import Any

import pytest

from verl_valgen.records import BestValue, GroupNumbers, RoundNumbers
from verl_valgen.trackers.summary import summary
from verl_valgen.viewing.wording import number

NOTHING = GroupNumbers()
ALWAYS = {"num_new_tokens": 83.2, "cut_off": 0.2, "empty": 0.0}


def lines(overall: GroupNumbers = NOTHING, width: int = 80, best_metric: str | None = None, **others: Any):
    return summary(RoundNumbers(12, 0.148, 433.4, overall, **others), 80, width, best_metric)


def test_a_round_without_strategies_is_a_row():
    overall = GroupNumbers(ALWAYS, {"exact_match": 0.5, "f1": 2345.6}, {"exact_match_pass_at_2": 0.75})
    assert lines(overall, 90, best=BestValue(0.6, 4), best_metric="exact_match") == [
        "Step 80: 12 samples in 0.148 s, 433 tokens/s",
        "| exact_match |   f1 | num_new_tokens | cut_off | empty | exact_match_pass_at_2 |",
        "|-------------|------|----------------|---------|-------|-----------------------|",
        "|         0.5 | 2346 |           83.2 |     0.2 |     0 |                  0.75 |",
        "exact_match: best 0.6 at step 4",
    ]


def test_a_number_of_about_a_thousand_has_no_exponent():
    assert [number(value) for value in (999.4, 999.5, 1000.0, -999.7)] == ["999", "1000", "1000", "-1000"]


def test_each_strategy_is_a_row_whichever_numbers_it_has():
    by_strategy = {
        "greedy": GroupNumbers({"cut_off": 0.0}, {"f1": 0.25}),
        "hot": GroupNumbers({"cut_off": 1.0}, {"f1": 0.75, "chrf": 41.0}, {"f1_majority": 1.0}),
    }
    mixed = GroupNumbers(scores={"f1": 0.5})  # says nothing: greedy answers and sampled ones
    assert lines(mixed, by_strategy=by_strategy, best=BestValue(0.83, 80), best_metric="greedy/f1") == [
        "Step 80: 12 samples in 0.148 s, 433 tokens/s",
        "| strategy |   f1 | cut_off | chrf | f1_majority |",
        "|----------|------|---------|------|-------------|",
        "| greedy   | 0.25 |       0 |      |             |",
        "| hot      | 0.75 |       1 |   41 |           1 |",
        "greedy/f1: best 0.83 at step 80",
    ]


def test_a_round_without_numbers_is_a_line():
    assert lines() == ["Step 80: 12 samples in 0.148 s, 433 tokens/s"]


MANY = {f"metric_{i}": (i + 1) / 7 for i in range(12)}
STRATEGIES = {name: GroupNumbers(ALWAYS, MANY) for name in ("greedy", "nucleus", "日本語", "s" * 64)}


@pytest.mark.parametrize("width", [80, 120, 40, 16])
@pytest.mark.parametrize("names", [["greedy", "nucleus"], list(STRATEGIES)], ids=["short", "long"])
def test_columns_that_do_not_fit_go_to_further_tables(width, names):
    from rich.cells import cell_len

    _, *table = lines(width=width, by_strategy={name: STRATEGIES[name] for name in names})
    assert all(cell_len(line) <= width for line in table)
    assert all(line.startswith("|") for line in table)
    cells = [cell.strip() for line in table for cell in line.split("|")]
    for name in (*MANY, *ALWAYS) if width > 16 else ():  # where a name is longer than the line, it is cut
        assert cells.count(name) == sum(line.count(f" {name} ") for line in table) >= 1
    for value in MANY.values():
        assert cells.count(f"{value:.3g}") == len(names)


def test_numbers_of_any_name_have_columns_of_their_own():
    names = ["[bold]x[/bold]", "\x1b[31m", "\\x1b[31m", "a|b", "=== Validation Samples (Step 7) ==="]
    by_strategy = {name: GroupNumbers(scores={name: float(i) for i, name in enumerate(names)}) for name in names}
    _, header, _, *rows = lines(width=1000, by_strategy=by_strategy)
    assert header == (
        "| strategy                            | [bold]x[/bold] | \\x1b[31m | \\x1b[31m | a|b | "
        "=== Validation Samples (Step 7) === |"
    )
    assert [row.split()[-10::2] for row in rows] == [["0", "1", "2", "3", "4"]] * 5


@pytest.mark.parametrize("metric", ["Prompt 1: x/f1", "=== x ===", "-" * 50, "a\nb", ""])
def test_what_the_best_value_is_of_is_quoted_where_it_looks_like_another_line(metric):
    *_, line = lines(best=BestValue(1.0, 2), best_metric=metric)
    assert line.startswith("'")
    assert line.endswith("': best 1 at step 2")
