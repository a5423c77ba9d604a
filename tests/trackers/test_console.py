"""The block on the terminal: its exact form, and what it leaves alone."""

from __future__ import annotations

import io
import sys

from destinations import make_sample
from tqdm import tqdm

from verl_valgen.trackers.console import ConsoleTracker


def test_block_has_the_documented_form(capsys):
    samples = [
        make_sample(index=0, prompt_text="What is the capital of France?", generation="Paris.\nIndeed."),
        make_sample(index=1, prompt_text="2+2?", generation="\x1b[31m4"),
    ]
    ConsoleTracker(500).log_samples(samples, 1000)
    assert capsys.readouterr().out == (
        "=== Validation Samples (Step 1000) ===\n"
        "Prompt 1: What is the capital of France?\n"
        "Generation 1: Paris.\\nIndeed.\n"
        "--------------------------------------------------\n"
        "Prompt 2: 2+2?\n"
        "Generation 2: \\x1b[31m4\n"
        "--------------------------------------------------\n"
    )


def test_text_is_cut(capsys):
    ConsoleTracker(10).log_samples([make_sample(prompt_text="p" * 11, generation="g\n" * 50)], 1)
    lines = capsys.readouterr().out.split("\n")
    assert lines[1] == "Prompt 1: ppppppp..."
    assert lines[2] == "Generation 1: g\\ng\\ng..."


def test_block_stands_between_progress_bar_lines(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=2, desc="training", mininterval=0) as bar:
        bar.update()
        ConsoleTracker(500).log_samples([make_sample(index=0), make_sample(index=1)], 7)
        bar.update()
    before, _, rest = terminal.getvalue().partition("=== Validation Samples (Step 7) ===\n")
    block, _, after = rest.rpartition("-" * 50 + "\n")
    assert before.endswith("\r")
    assert "training" not in block
    assert "training: 100%" in after


def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    ConsoleTracker(500).log_samples([make_sample(generation="日本 ok")], 1)
    terminal.seek(0)
    assert "Generation 1: \\u65e5\\u672c ok\n" in terminal.read()
