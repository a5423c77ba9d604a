"""The block on the terminal: its exact form, and what it leaves alone."""

from __future__ import annotations

import io
import sys
from typing import Any

from destinations import make_round, make_sample, make_settings
from tqdm import tqdm

from verl_valgen.records import BestValue, GroupNumbers, Round, RoundNumbers
from verl_valgen.trackers.console import ConsoleTracker


def without_summary(capsys) -> str:
    lines = capsys.readouterr().out.splitlines(keepends=True)
    assert lines[-1].startswith("Step ")
    return "".join(lines[:-1])


def test_block_has_the_documented_form(capsys):
    samples = [
        make_sample(index=0, prompt_text="What is the capital of France?", generation="Paris.\nIndeed."),
        make_sample(index=1, prompt_text="2+2?", generation="\x1b[31m4"),
    ]
    ConsoleTracker(make_settings()).log(make_round(samples, 1000))
    assert without_summary(capsys) == (
        "=== Validation Samples (Step 1000) ===\n"
        "Prompt 1: What is the capital of France?\n"
        "Generation 1: Paris.\\nIndeed.\n"
        "--------------------------------------------------\n"
        "Prompt 2: 2+2?\n"
        "Generation 2: \\x1b[31m4\n"
        "--------------------------------------------------\n"
    )


def test_text_is_cut(capsys):
    tracker = ConsoleTracker(make_settings(max_log_chars=16))
    tracker.log(make_round([make_sample(prompt_text="p" * 17, generation="g\n" * 50)], 1))
    lines = capsys.readouterr().out.split("\n")
    assert lines[1] == "Prompt 1: ppppppppppppp..."
    assert lines[2] == "Generation 1: g\\ng\\ng\\ng\\ng..."


def test_block_stands_between_progress_bar_lines(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=2, desc="training", mininterval=0) as bar:
        bar.update()
        ConsoleTracker(make_settings()).log(make_round([make_sample(index=0), make_sample(index=1)], 7))
        bar.update()
    before, _, rest = terminal.getvalue().partition("=== Validation Samples (Step 7) ===\n")
    block, _, after = rest.rpartition("-" * 50 + "\n")
    assert before.endswith("\r")
    assert "training" not in block
    assert "training: 100%" in after


def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    ConsoleTracker(make_settings()).log(make_round([make_sample(generation="日本 ok")], 1))
    terminal.seek(0)
    assert "Generation 1: \\u65e5\\u672c ok\n" in terminal.read()


def test_completions_of_a_prompt_stand_together_and_are_told_apart(capsys):
    samples = [
        make_sample(index=0, strategy="greedy", generation="a", prompt_text="p"),
        make_sample(index=0, strategy="hot", completion=0, generation="b", prompt_text="p"),
        make_sample(index=0, strategy="hot", completion=1, generation="c", prompt_text="p"),
    ]
    ConsoleTracker(make_settings()).log(make_round(samples, 1))
    assert without_summary(capsys).splitlines()[1:-1] == [
        "Prompt 1: p", "Generation 1 (greedy): a", "Generation 1 (hot, 1): b", "Generation 1 (hot, 2): c",
    ]  # fmt: skip


ALWAYS = {"num_new_tokens": 83.2, "cut_off": 0.2}


def summary(capsys, overall: GroupNumbers, **others: Any) -> str:
    ConsoleTracker(make_settings(max_log_chars=16)).log(Round(8, [], RoundNumbers(5, 1.234, 2345.6, overall, **others)))
    title, line = capsys.readouterr().out.splitlines(keepends=True)
    assert title == "=== Validation Samples (Step 8) ===\n"
    return line


def test_a_round_in_one_line(capsys):
    overall = GroupNumbers(
        ALWAYS, {"exact_match": 0.5, "is_best": 0.25}, {"exact_match_best": 1.0, "exact_match_pass_at_2": 0.75}
    )
    by_source = {"x": GroupNumbers({}, {"exact_match": 1.0})}
    assert summary(capsys, overall, by_source=by_source, best=BestValue(0.6, 4)) == (
        "Step 8: 5 samples in 1.23 s, 2346 tokens/s; best 0.6 at step 4; num_new_tokens 83.2, cut_off 0.2, "
        "exact_match 0.5, is_best 0.25\n"
    )


def test_a_round_of_several_strategies_in_one_line(capsys):
    by_strategy = {
        "a": GroupNumbers({"num_new_tokens": 3.0}, {"f1": 0.25}, {"f1_majority": 1.0}),
        "b": GroupNumbers({"num_new_tokens": 4.0}, {"f1": 0.75, "chrf": 41.0}),
    }
    assert summary(capsys, GroupNumbers(ALWAYS, {"f1": 0.5}), by_strategy=by_strategy) == (
        "Step 8: 5 samples in 1.23 s, 2346 tokens/s; num_new_tokens 83.2, cut_off 0.2; a: f1 0.25; "
        "b: f1 0.75, chrf 41\n"
    )


def test_the_line_is_cut_and_printable(capsys):
    line = summary(capsys, GroupNumbers(ALWAYS, {f"\x1b[31m{i}": 1.0 for i in range(1000)}))
    assert line.endswith("...\n")
    assert len(line) == 2001
    assert line[:-1].isprintable()
