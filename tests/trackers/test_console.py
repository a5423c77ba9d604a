"""What the terminal shows of a round: its exact form, how much of it, and what it leaves alone."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from destinations import make_round, make_run, make_sample
from tqdm import tqdm

from verl_valgen.records import Round, RoundNumbers, Sample
from verl_valgen.trackers.console import ConsoleTracker

RULE = "-" * 50


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(capsys, samples: list[Sample], step: int = 1, **settings: Any) -> list[str]:
    """The lines of a round, without those that sum it up."""
    ConsoleTracker(make_run(Path("run/generations"), **settings)).log(make_round(samples, step))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Step {step}: {len(samples)} sample{'s' * (len(samples) != 1)} in 1 s, 1 tokens/s"
    return lines[:-1]


def test_block_has_the_documented_form(capsys):
    samples = [
        make_sample(
            index=0, prompt_text="What is the capital of France?", generation="Paris.\nIndeed.", reference="Paris",
            scores={"exact_match": 0.0, "rouge_l": 2 / 3, "failed": None}, finish_reason="length",
            origin="row 6, 2 turns, 3 tools",
        ),
        make_sample(index=1, prompt_text="2+2?", generation="\x1b[31m4", reference=None, origin="own.jsonl line 3"),
        make_sample(index=2, prompt_text="And?", generation=" \n", reference="a\nb", finish_reason="stop"),
    ]  # fmt: skip
    bare = [
        "=== Validation Samples (Step 1000) ===",
        "Prompt 1: What is the capital of France?",
        "Generation 1: Paris.\\nIndeed.",
        RULE,
        "Prompt 2: 2+2?",
        "Generation 2: \\x1b[31m4",
        RULE,
        "Prompt 3: And?",
        "Generation 3:  \\n",
        RULE,
    ]
    assert shown(capsys, samples, 1000, console="samples") == bare
    assert shown(capsys, samples, 1000) == [
        *bare[:3],
        "Expected 1: Paris",
        "Scores 1: exact_match 0, rouge_l 0.667; cut off",
        "Source 1: row 6, 2 turns, 3 tools",
        *bare[3:6],
        "Source 2: own.jsonl line 3",
        *bare[6:9],
        "Expected 3: a\\nb",
        "Scores 3: empty; ended by a stop string",
        RULE,
    ]


def test_brief_is_what_sums_a_round_up_and_none_is_nothing(capsys):
    assert shown(capsys, [make_sample()], console="brief") == []
    ConsoleTracker(make_run(console="none")).log(make_round([make_sample()], 1, scores={"f1": 1.0}))
    assert capsys.readouterr() == ("", "")


def test_an_answer_that_failed_the_check_is_not_judged(capsys):
    sample = make_sample(generation="", finish_reason="time", scores={"f1": 1.0}, verified=False, reference=None)
    assert shown(capsys, [sample.shown()])[2:] == [
        "Generation 1: (withheld: failed the check against the trainer's model)", RULE,
    ]  # fmt: skip
    assert "Scores 1: f1 1; empty; out of time" in shown(capsys, [replace(sample, verified=None)])


def test_text_is_cut(capsys):
    sample = make_sample(prompt_text="p" * 17, generation="g\n" * 50, reference="r" * 17, origin="s" * 17)
    assert shown(capsys, [sample], max_chars=16)[1:-1] == [
        "Prompt 1: ppppppppppppp...",
        "Generation 1: g\\ng\\ng\\ng\\ng...",
        "Expected 1: rrrrrrrrrrrrr...",
        "Source 1: sssssssssssss...",
    ]


def test_each_strategys_first_answer_is_shown_under_its_name(capsys):
    samples = [
        make_sample(index=0, strategy="greedy", generation="a", prompt_text="p", scores={"f1": 1.0}),
        make_sample(index=0, strategy="hot", completion=0, generation="b", scores={"f1": 0.5}),
        make_sample(index=0, strategy="hot", completion=1, generation="c", scores={"f1": 0.25}),
    ]
    assert shown(capsys, samples)[1:] == [
        "Prompt 1: p", "Generation 1 (greedy): a", "Generation 1 (hot, 1): b", "Expected 1: reference 0",
        "Scores 1 (greedy): f1 1", "Scores 1 (hot, 1): f1 0.5", RULE,
        "... 1 more in run/generations/step_00000001.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("console", ["full", "samples"])
def test_of_many_prompts_the_first_are_shown(capsys, console):
    samples = [make_sample(index=i, strategy=name) for i in range(23) for name in ("a", "b")]
    lines = shown(capsys, samples, 80, console=console)
    assert [line for line in lines if line.startswith("Prompt")] == [f"Prompt {i + 1}: question {i}" for i in range(20)]
    assert lines[-1] == "... 6 more in run/generations/step_00000080.jsonl"
    assert lines.count(RULE) == 20
    lines = shown(capsys, samples, 80, console=console, console_prompts=23)
    assert (lines.count(RULE), lines[-1]) == (23, RULE)


def test_block_stands_between_progress_bar_lines(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=2, desc="training", mininterval=0) as bar:
        bar.update()
        ConsoleTracker(make_run()).log(make_round([make_sample(index=0), make_sample(index=1)], 7))
        bar.update()
    before, _, rest = terminal.getvalue().partition("=== Validation Samples (Step 7) ===\n")
    block, _, after = rest.rpartition("Step 7: ")
    assert before.endswith("\r")
    assert "training" not in block
    assert "\r" not in block
    assert "training: 100%" in after


def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    sample = make_sample(generation="日本 ok", reference="é", origin="ü.txt line 1")
    ConsoleTracker(make_run()).log(make_round([sample], 1))
    terminal.seek(0)
    lines = terminal.read().splitlines()
    assert lines[2:5] == ["Generation 1: \\u65e5\\u672c ok", "Expected 1: \\xe9", "Source 1: \\xfc.txt line 1"]


def test_a_program_without_a_console_has_its_round_recorded(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    ConsoleTracker(make_run()).log(Round(1, [], RoundNumbers(0, 1.0, 1.0)))
