"""The process of the metrics: what it says, and what is left when it fails, hangs or dies."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from unit.scores.test_aggregates import sample

from verl_valgen.records import BestValue, Sample, Verdict
from verl_valgen.scores.aggregates import summarize_round
from verl_valgen.scores.scoring import Scoring

SOURCE = """
import os, time

def length(sample):
    print("\\x1b[31m never seen")
    return len(sample.generation)

def few(sample):
    return sample.num_new_tokens < 9

def several(sample):
    return {"score": 1, "chars": len(sample.generation), "pred": "vote", "note": "text", "none": None}

def odd(sample):
    return {"score": 1, "a\\x1b[2J/b": 2, "list": [1], "true": True}

def starting(sample):
    import subprocess
    started = subprocess.Popen(["sleep", "600"])
    open(os.path.join(os.path.dirname(__file__), "pid"), "w").write(str(started.pid))
    while True:
        time.sleep(0.01)

def raising(sample):
    if sample.index == 0:
        raise RuntimeError("no \\x1b[31m way")
    return True

def text(sample):
    return "good"

def not_a_number(sample):
    return float("nan")

def in_python(sample):
    while sample.step == 2:
        time.sleep(0.01)

def in_c(sample):
    return sample.step == 2 and 9 ** 9 ** 9  # holds the lock of the interpreter

def dying(sample):
    os._exit(3)

def exiting(sample):
    raise SystemExit(3)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(SOURCE)
    return path


@contextmanager
def scoring(own: Path, *names: str) -> Iterator[Scoring]:
    made = Scoring([name if name == "exact_match" else f"{own}:{name}" for name in names])
    try:
        yield made
    finally:
        made.close()


SAMPLES = [
    sample(0, origin="row 0", generation="Paris", reference="paris", extra_info={1: Path("x")}),
    sample(1, generation="\ud800\x1b[2J", reference="Rome"),
]


def judge(made: Scoring, samples: list[Sample], deadline: float) -> list[Mapping[str, Verdict]]:
    """Each sample's verdicts by metric."""
    return [sample.verdicts for sample in made.score(samples, deadline)]


def test_every_metric_says_something_of_every_sample(own, caplog):
    with scoring(own, "exact_match", "length", "several") as made:
        for _ in range(2):  # one process serves all rounds
            judged = made.score(SAMPLES, math.inf)
    verdicts = [sample.verdicts for sample in judged]
    assert verdicts[0] == {
        "exact_match": Verdict({"exact_match": 1.0}, True, "paris"),
        "length": Verdict({"length": 5.0}, None, "paris"),
        "several": Verdict(
            {"several": 1.0, "several_chars": 5.0}, None, "vote", {"several_pred": "vote", "several_note": "text"}
        ),
    }
    assert verdicts[1]["exact_match"].scores == {"exact_match": 0.0}
    assert caplog.text == ""
    assert judged[0].scores == {"exact_match": 1.0, "length": 5.0, "several": 1.0, "several_chars": 5.0}
    assert judged[0].score_texts == {"several_pred": "vote", "several_note": "text"}
    assert judged[0].to_dict().keys() >= {"scores", "score_texts", "ground_truth"}


def test_few_numbers_are_logged_of_two_strategies_three_metrics_and_two_sources(own):
    """Greedy, and four answers of nucleus, by two metrics that are 0 or 1 and one that is not."""
    answered = [
        sample(index, completion, strategy, generation="4" if completion else "no", reference="4", data_source=source)
        for index, source in enumerate(["sums", "capitals", "sums"])
        for strategy, completion in [("greedy", 0), *(("nucleus", completion) for completion in range(4))]
    ]
    with scoring(own, "exact_match", "few", "length") as made:
        judged = made.score(answered, math.inf)
    strategies, scores = ("greedy", "nucleus"), ("exact_match", "few", "length")
    numbers = summarize_round(judged, 1.0, 1, strategies=strategies, n=4)
    logged = replace(numbers, best=BestValue(0.0, 1)).flat()
    assert logged.keys() == {
        *("num_samples", "seconds", "tokens_per_s", "best", "best_step"),
        *(f"{one}/{name}" for one in strategies for name in (*scores, "num_new_tokens", "cut_off", "empty")),
        *(f"nucleus/{score}_{what}" for score in ("exact_match", "few") for what in ("pass_at_4", "majority")),
        *(f"by_source/{source}/{score}" for source in ("sums", "capitals") for score in scores),
    }
    assert len(logged) == 27
    assert (logged["greedy/exact_match"], logged["nucleus/exact_match"]) == (0.0, 0.75)
    assert (logged["nucleus/exact_match_pass_at_4"], logged["nucleus/exact_match_majority"]) == (1.0, 1.0)
    assert logged["by_source/sums/exact_match"] == 0.0
    assert (logged["greedy/length"], logged["nucleus/few"]) == (2.0, 1.0)


def test_without_metrics_there_is_no_process():
    made = Scoring([])
    made.start()
    assert made._process is None
    assert judge(made, SAMPLES, math.inf) == [{}, {}]


def test_one_that_raises_costs_that_value_and_one_warning(own, caplog):
    with caplog.at_level(logging.WARNING, "verl_valgen"), scoring(own, "raising", "text", "length") as made:
        for _ in range(2):
            first, second = judge(made, SAMPLES, math.inf)
    assert first.keys() == {"length"}
    assert second["raising"].scores == {"raising": 1.0}
    assert caplog.messages == [
        "metric raising: 1 of 2 samples have no score (first: row 0): RuntimeError: no \\x1b[31m way (own.py, line 26)",
        "metric text: 2 of 2 samples have no score (first: row 0): ValueError: could not convert string to float: "
        "'good'",
    ]


def test_a_score_that_is_no_number_arrives_as_it_is(own):
    with scoring(own, "not_a_number") as made:
        assert math.isnan(judge(made, SAMPLES, math.inf)[0]["not_a_number"].scores["not_a_number"])


@pytest.mark.parametrize("name", ["in_python", "in_c"])
def test_one_that_hangs_is_left_behind_with_what_there_is(own, name, caplog):
    with caplog.at_level(logging.WARNING, "verl_valgen"), scoring(own, "length", name, "exact_match") as made:
        judge(made, SAMPLES, math.inf)  # by then all is loaded
        hanging = made._process
        assert hanging is not None
        first, second = judge(made, [replace(one, step=2) for one in SAMPLES], time.time() + 5.0)
        assert hanging._process.poll() is not None  # killed, not waited for
    assert first.keys() == second.keys() == {"length"}
    assert caplog.messages == [
        f"metric {name} did not end in time, so that samples lack scores (see generation.max_round_time_s)"
    ]


@pytest.mark.parametrize("name", ["dying", "exiting"])
def test_one_that_ends_the_process_is_given_up_in_the_end(own, name, caplog):
    with caplog.at_level(logging.WARNING, "verl_valgen"), scoring(own, "length", name) as made:
        found = [judge(made, SAMPLES, math.inf)[0].keys() for _ in range(5)]
    assert found == [{"length"}] * 5
    assert caplog.messages == [
        f"metric {name} ended the process that it ran in, so that samples lack scores "
        "(see generation.max_round_time_s)",
        f"no more scores of metric {name}: it failed so in 3 rounds in a row",
    ]


def test_one_that_hangs_comes_last_from_then_on(own):
    with scoring(own, "in_python", "exact_match") as made:
        judge(made, SAMPLES, math.inf)  # by then all is loaded
        judge(made, [replace(one, step=2) for one in SAMPLES], time.time() + 0.5)
        assert made.metrics == ["exact_match", f"in_python={own}:in_python"]
        assert judge(made, SAMPLES, math.inf)[0].keys() == {"exact_match", "in_python"}


def test_functions_of_one_name_get_names(own):
    made = Scoring([f"first={own}:length", f"second={own}:length"])
    try:
        assert judge(made, SAMPLES, math.inf)[0].keys() == {"first", "second"}
    finally:
        made.close()


def test_one_that_cannot_be_loaded_costs_its_own_scores(own, caplog):
    broken = own.with_name("broken.py")
    broken.write_text("def f(sample): return 1\nraise OSError('on import')\n")
    made = Scoring([f"{broken}:f", f"{own}:length"])
    with caplog.at_level(logging.WARNING, "verl_valgen"):
        first, _ = judge(made, SAMPLES, math.inf)
    made.close()
    assert first.keys() == {"length"}
    assert caplog.messages == ["metric f: 2 of 2 samples have no score (first: row 0): OSError: on import"]


def test_the_process_sees_no_gpu_and_what_the_program_can_import(own, monkeypatch, tmp_path):
    (tmp_path / "beside_the_program.py").write_text(
        "import os\ndef gpus(sample): return float(os.environ['CUDA_VISIBLE_DEVICES'] == '')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    made = Scoring(["beside_the_program:gpus"])
    assert judge(made, SAMPLES, math.inf)[0]["gpus"].scores == {"gpus": 1.0}
    made.close()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_where_no_process_can_be_started_there_are_no_scores(monkeypatch, own, caplog):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with caplog.at_level(logging.WARNING, "verl_valgen"), scoring(own, "length") as made:
        assert judge(made, SAMPLES, math.inf) == [{}, {}]
        assert judge(made, SAMPLES, math.inf) == [{}, {}]
    assert [text.partition(":")[0] for text in caplog.messages] == ["no scores"]


def test_a_process_that_still_loads_is_waited_for_by_the_next_round(own, caplog, tmp_path):
    """It loads as soon as a file is there."""
    gate = tmp_path / "gate"
    slow = tmp_path / "slow.py"
    slow.write_text(
        f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\ndef f(sample): return 1\n"
    )
    made = Scoring([f"{slow}:f"])
    with caplog.at_level(logging.WARNING, "verl_valgen"):
        assert judge(made, SAMPLES, time.time() + 0.1) == [{}, {}]
        gate.touch()
        assert judge(made, SAMPLES, math.inf)[1]["f"].scores == {"f": 1.0}
    made.close()
    assert caplog.messages == [
        "the metrics were not loaded yet, so that samples lack scores (see generation.max_round_time_s)"
    ]


def test_one_that_never_loads_is_given_up(own, caplog, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text("import time\nwhile True: time.sleep(1)\ndef f(sample): return 1\n")
    made = Scoring([f"{slow}:f"])
    with caplog.at_level(logging.WARNING, "verl_valgen"):
        for _ in range(4):
            assert judge(made, SAMPLES, time.time() + 0.05) == [{}, {}]
    assert made._process is None
    assert [text[:16] for text in caplog.messages] == ["the metrics were", "no more scores: "]


def test_a_round_that_has_used_up_its_time_costs_its_scores_and_no_process(own, caplog):
    with caplog.at_level(logging.WARNING, "verl_valgen"), scoring(own, "length") as made:
        judge(made, SAMPLES, math.inf)
        for _ in range(4):
            assert judge(made, SAMPLES, time.time() - 1.0) == [{}, {}]
        assert judge(made, SAMPLES, math.inf)[0].keys() == {"length"}
    assert caplog.messages == ["the answers left no time for metrics (see generation.max_round_time_s)"]


def test_a_process_that_was_killed_between_two_rounds_is_begun_anew(own):
    with scoring(own, "length") as made:
        judge(made, SAMPLES, math.inf)
        assert made._process is not None
        made._process._process.kill()
        judge(made, SAMPLES, math.inf)
        assert judge(made, SAMPLES, math.inf)[0].keys() == {"length"}


def test_odd_names_and_values(own):
    with scoring(own, "odd") as made:
        scores = judge(made, SAMPLES, math.inf)[0]["odd"].scores
    assert scores == {"odd": 1.0, "odd_a__2J_b": 2.0, "odd_true": 1.0}


def test_what_a_metric_has_started_goes_with_it(own):
    pid_file = own.with_name("pid")
    with scoring(own, "starting") as made:
        made.start()
        end = time.monotonic() + 60
        threading.Thread(target=made.score, args=(SAMPLES, math.inf), daemon=True).start()
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < end:
            time.sleep(0.01)
    state = Path(f"/proc/{pid_file.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # killed; whoever adopted it may not have looked


def test_a_custom_row_that_json_cannot_hold_keeps_its_scores(own):
    with scoring(own, "length") as made:
        assert judge(made, [replace(SAMPLES[0], extra_info={(1, 2): b"x"})], math.inf)[0]["length"].scores == {
            "length": 5.0
        }
