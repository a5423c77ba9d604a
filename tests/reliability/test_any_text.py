"""Whatever a model, a data set or an exception says: shown without harm, stored as it is, and nothing raises."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import unicodedata
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from readback import read_jsonl
from trackers.destinations import Destination, Mlflow, Swanlab, Wandb, make_round, make_run, make_sample

from verl_valgen.records import BestValue, GroupNumbers, Round, RoundNumbers, Sample
from verl_valgen.scores.aggregates import source_key
from verl_valgen.scores.scoring import Scoring
from verl_valgen.text import storable, truncate
from verl_valgen.trackers import open_trackers
from verl_valgen.trackers.base import Tracker
from verl_valgen.trackers.composite import CompositeTracker
from verl_valgen.trackers.console import ConsoleTracker
from verl_valgen.trackers.jsonl import JsonlTracker
from verl_valgen.trackers.table import build_table, sample_texts

pytestmark = pytest.mark.any_verl

PROFILE = settings.get_profile("reliability")

NASTY = [
    *("", " ", "\n", "\r", "\x00", "\x07\b", "\x1b[31m", "\x1b[2J\x1b[H", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\"),
    *("\x9b31m", "\x85", "\u2028\u2029", "\u202eevil\u202c", "\u2066\u200f", "\u200b\u200d\ufeff", "\U000e0041"),
    *("\ud800", "\udfff", "\ud83d", "\ude00", "\ufffe", "<script>alert(1)</script>", "[bold]|x|[/bold]", "</td>"),
    *("007", "NaN", "null", '"', "'", "\\", "\\n", "%s {} {0}", "=1+1", ",", ";", "../..", "/", "日本語", "e\u0301"),
]
LONG = st.sampled_from(["x", "\x1b", "\u202e", "日"]).map(lambda char: char * 100_000)
PIECES = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=()), max_size=9)
TEXTS = st.lists(PIECES, max_size=5).map("".join)
SCORES = st.dictionaries(
    TEXTS | st.sampled_from(["step", "score_step", "index"]), st.none() | st.floats() | st.integers(0, 1), max_size=3
)
SAMPLES = st.lists(
    st.builds(
        make_sample,
        index=st.integers(0, 2),
        completion=st.integers(0, 2),
        scores=SCORES,
        reference=st.none() | TEXTS,
        data_source=st.none() | TEXTS,
        origin=st.none() | TEXTS,
        finish_reason=st.sampled_from(["eos", "stop", "length", "time"]),
        params=st.dictionaries(TEXTS, TEXTS | st.floats(), max_size=2),
        strategy=TEXTS.map(lambda text: text[:64]),  # longer ones are refused where they are configured
        prompt=TEXTS,
        **dict.fromkeys(("prompt_text", "generation"), TEXTS | LONG),
    ),
    max_size=4,
)
LENGTHS = st.integers(16, 200)
SCALARS = st.dictionaries(TEXTS, st.floats(allow_nan=False), max_size=4)


def is_harmless(line: str) -> bool:
    """Nothing in it steers a terminal or hides, and it can be encoded."""
    return not {unicodedata.category(char) for char in line} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


# The console

LINES = re.compile(
    r"=== Validation Samples \(Step 7\) ===|-{50}|Step 7: |\| ?|\.\.\. \d+ more in |"
    r"(?:Prompt|Expected|Source) \d: |(?:Generation|Scores) \d(?: \(.*\))?: |.+: best 0\.5 at step 1e\+09$"
)
"""The beginnings of all lines."""


def shown(tracker: ConsoleTracker, samples: list[Sample], numbers: RoundNumbers) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        tracker.log(Round(7, samples, numbers))
    text = stdout.getvalue()
    assert text.endswith("\n")
    return text[:-1].split("\n")


@PROFILE
@given(
    samples=SAMPLES,
    scores=SCALARS,
    by_strategy=st.dictionaries(TEXTS, SCALARS, max_size=2),
    best_metric=TEXTS.filter(str),
    max_chars=LENGTHS,
    console=st.sampled_from(["full", "samples", "brief"]),
    max_prompts=st.integers(1, 3),
)
def test_the_console_shows_harmless_lines_of_bounded_length_that_cannot_be_forged(
    samples, scores, by_strategy, best_metric, max_chars, console, max_prompts
):
    groups = {name: GroupNumbers(scores=own) for name, own in by_strategy.items()}
    numbers = RoundNumbers(len(samples), 0.0, 1e9, GroupNumbers(scores=scores), groups, best=BestValue(0.5, 10**9))
    run = make_run(max_chars=max_chars, console=console, console_prompts=max_prompts, best_metric=best_metric)
    lines = shown(ConsoleTracker(run), samples, numbers)
    assert all(map(is_harmless, lines))
    assert all(map(LINES.match, lines))
    by_prompt: dict[int, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.index, []).append(sample)
    chosen = [] if console == "brief" else list(by_prompt.values())[:max_prompts]
    answers = [len({sample.strategy for sample in of_prompt}) for of_prompt in chosen]
    is_full = console == "full"

    def count(beginning: str) -> int:
        return sum(line.startswith(beginning) for line in lines)

    assert count("=== ") == (console != "brief")
    assert count("Prompt ") == count("-" * 50) == len(chosen)
    assert count("Generation ") == sum(answers)
    assert count("Expected ") == is_full * sum(of_prompt[0].reference is not None for of_prompt in chosen)
    assert count("Source ") == is_full * sum(of_prompt[0].origin is not None for of_prompt in chosen)
    assert count("Scores ") <= is_full * sum(answers)
    assert count("... ") == (console != "brief" and sum(answers) < len(samples))
    assert count("Step ") == 1
    # Each character of a strategy's name may have become ten, in "\\U000e0041"; without a terminal a table is as wide
    # as `terminal.WIDTH_OF_FILES`.
    for line in lines:
        num_more = {"Generation": 700, "Scores": 2700}.get(line.partition(" ")[0], 0)
        assert len(line) <= max(120, max_chars + 60) + num_more


# JSON lines


def joined(value: Any) -> Any:
    """`value` with surrogates that happen to stand in pairs read as the characters that they mean."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if isinstance(value, dict):
        return {joined(key): joined(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@PROFILE
@given(samples=SAMPLES)
def test_json_lines_give_back_every_record(tmp_path, samples):
    JsonlTracker(tmp_path).log(make_round(samples, 3))
    content = (tmp_path / "step_00000003.jsonl").read_bytes()
    assert content.count(b"\n") == len(samples)
    assert read_jsonl(tmp_path)[3] == [joined(sample.to_dict()) for sample in samples]


# Tables and keys of the trackers


@PROFILE
@given(samples=SAMPLES, max_chars=LENGTHS)
@example([make_sample(scores={"step": 1.0, "score_step": 2.0})], 99)
@example([make_sample(scores={"\x00": 1.0, "\ud800": 2.0})], 99)
def test_a_table_is_of_short_texts_that_can_be_stored_under_different_columns(samples, max_chars):
    columns, table = build_table(samples, max_chars)
    assert len(set(columns)) == len(columns)
    texts = sample_texts(samples, max_chars, "default")
    for text in (*columns, *texts.values(), *(cell for row in table for cell in row if isinstance(cell, str))):
        assert "\x00" not in text
        text.encode("utf-8")
    assert all(len(text) <= max_chars for text in texts.values())
    assert [len(row) for row in table] == [len(columns)] * len(samples)
    for sample, row in zip(samples, table, strict=True):
        cells = dict(zip(columns, row, strict=True))
        assert cells["generation"] == storable(truncate(sample.generation, max_chars))
        assert sorted(cell for cell in row[3 : len(row) - 9] if cell is not None) == sorted(
            score for score in sample.scores.values() if score is not None and math.isfinite(score)
        )
    json.dumps(table, allow_nan=False)


@PROFILE
@given(sources=st.sets(TEXTS | LONG, max_size=6))
@example({"a/../b", "a/b", "a//b", "/a/b", "a/b/", "a_b", "a b"})
def test_sources_of_data_have_short_keys_that_no_tracker_changes(sources):
    keys = {source_key(source) for source in sources}
    assert len(keys) == len(sources)
    for key in keys:
        assert key.isascii()
        assert is_harmless(key)
        assert len(key) <= 64
        assert all(part.strip(".") for part in key.split("/"))


# Runs of trackers, read back


def nasty_samples() -> list[Sample]:
    """One text in each place: a table has few columns, so scores have some of the names."""
    return [
        make_sample(
            index=i,
            strategy=text,
            data_source=text,
            scores={text: float(i), "exact": 1.0},
            **dict.fromkeys(("prompt", "prompt_text", "generation", "reference"), f"{text}a{text}"),
        )
        for i, text in enumerate(NASTY)
    ]


@pytest.fixture(params=["wandb", "swanlab", "mlflow"])
def destination(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if request.param == "mlflow":
        from mlflow import MlflowClient

        uri = f"sqlite:///{tmp_path}/mlflow.db"
        MlflowClient(uri).create_experiment("test", artifact_location=str(tmp_path / "artifacts"))
        opened: Destination = Mlflow(uri)
    else:
        opened = {"wandb": Wandb, "swanlab": Swanlab}[request.param](tmp_path)
    yield opened
    opened.discard()


@pytest.mark.slow
def test_a_run_holds_every_row_and_number_of_nasty_samples(destination, caplog):
    samples = nasty_samples()
    tracker = CompositeTracker({"run": destination.tracker})
    keys = [f"val/gen/by_source/{source_key(text)}/exact" for text in NASTY]
    by_source = {source_key(text): {"exact": float(number)} for number, text in enumerate(NASTY)}
    tracker.log(make_round(samples, 1, by_source=by_source))
    tracker.close()
    found = destination.read()[1]

    assert [record.message for record in caplog.records if record.name.startswith("verl_valgen")] == []
    cell, shown = destination.cell, destination.shown
    assert len(found.rows) == len(samples)
    for sample, row in zip(samples, found.rows, strict=True):
        for column in ("strategy", "prompt", "generation", "reference"):
            assert row[column] == shown(getattr(sample, column))
        assert (row["index"], row["exact"]) == (cell(sample.index), cell(1.0))
    assert {key: found.values[key] for key in keys} == {key: float(number) for number, key in enumerate(keys)}


# What is logged


class StrangeError(Exception):
    pass


StrangeError.__qualname__ = "\x1b[31m"


class Failing(Tracker):
    """Every call fails, in somebody else's words."""

    def __init__(self, words: str) -> None:
        self._words = words

    def log(self, round: Round) -> None:
        raise (StrangeError if round.step % 2 else RuntimeError)(self._words)


def assert_readable(messages: list[str]) -> None:
    for message in messages:
        assert is_harmless(message)
        assert len(message) < 700


@PROFILE
@given(words=TEXTS | LONG)
def test_warnings_quote_what_a_tracker_says_in_one_harmless_line(caplog, words):
    caplog.clear()
    tracker = CompositeTracker({"failing": Failing(words)})
    for step in range(3):
        tracker.log(make_round([make_sample()], step))
    assert len(caplog.messages) == 3  # two kinds of errors, and that it was given up
    assert_readable(caplog.messages)


@PROFILE
@given(names=st.lists(TEXTS | LONG, max_size=3))
def test_loggers_of_any_name_cost_a_harmless_line(tmp_path, caplog, names):
    caplog.clear()
    caplog.set_level("INFO")
    opened = open_trackers(names, make_run(tmp_path, max_chars=99))
    assert list(opened.trackers) == ["jsonl", "console"]
    assert len(caplog.messages) == len(set(names))
    assert_readable(caplog.messages)


def test_nasty_samples_are_scored_and_what_a_metric_says_of_them_is_harmless(tmp_path, caplog):
    path = tmp_path / "metric.py"
    path.write_text("def raises(sample):\n    raise ValueError(sample.generation)\n\ndef length(sample):\n")
    path.write_text(path.read_text() + "    return float(len(sample.generation))\n")
    scoring = Scoring([f"{path}:raises", f"{path}:length"])
    samples = nasty_samples()
    try:
        judged = scoring.score(samples, math.inf)
    finally:
        scoring.close()
    lengths = [sample.scores["length"] for sample in judged]
    assert lengths == [float(len(joined(sample.generation))) for sample in samples]
    (message,) = caplog.messages  # once for a metric
    assert message.startswith("metric raises: ")
    assert_readable(caplog.messages)
