"""No failure of a round stops or stalls a run: whatever goes wrong at any stage, on any rank.

One run of verl's trainer on two ranks meets one fault after the other. Each is in two rounds running, and behind them
lies a round without; or in one round, where it takes time. Training must be what it is without generation, every fault
must be told once, and all files must be there but those that a fault cost.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from end_to_end.server import ForkedRun, TrainerServer
from end_to_end.trainer import Assets, strategy
from reliability.conftest import IS_WHOLE, record_figure
from reliability.planting import Fault, in_environment, judged_steps
from reliability.round_times import notes_of
from same_training import SEED_AND_REPORT, differences, random_states

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent

WAYS = {
    "one": ["+generation.ranks=1"],
    "spread": ["+generation.ranks=2"],
    "sharded": ["+generation.gather=sharded"],
    "beside": ["+generation.overlap=true"],
}
"""Rank 0 answers with a copy of its own; both do; both do through the sharded model; rank 0 while training goes on."""

ALONE = ("one", "beside")

CASES = (
    list(itertools.product(WAYS, ("fsdp", "fsdp2")))
    if IS_WHOLE
    else [("one", "fsdp2"), ("spread", "fsdp"), ("sharded", "fsdp2"), ("beside", "fsdp2")]
)
IN_TIME = [case for case in CASES if case[0] != "beside"]
"""Where a round's time is that of its call."""
ON_ALL_RANKS = {
    "prepare": ("exception", "oom"),
    "gather": ("exception", "oom", "nan"),
    "prefill": ("exception", "oom", "oom_once", "nan"),
    "decode": ("exception", "oom", "oom_once", "nan"),
    "exchange": ("exception", "oom"),
}
ON_LOGGING_RANK = {
    "scoring": ("exception", "oom"),
    "metric": ("exception", "oom", "nan", "death"),
    "jsonl": ("exception", "oom"),
    "console": ("exception", "oom"),
}
NUM_PROMPTS, NUM_SAMPLES = 5, 10
LIMIT_S, DELAY_S = 1.0, 3.0
MARGIN_S = 15.0
"""For a busy machine. What is promised is a second; how long it took is a figure of `make reliability`."""

MAX_EXIT_S = 10.0
BEFORE = "from reliability import planting\nplanting.plant()\n"

LATE = re.compile(
    r"(jsonl|console): a round takes longer than 0\.8 s to record; training does not wait"
    r"|(jsonl|console): a round was not recorded: TimeoutError: \2 did not finish \d+ calls in time"
)
LATE_METRICS = re.compile(
    r"the answers left no time for metrics .*|the metrics were not loaded yet, .*|no more scores: the metrics were .*"
    r"|metric judge did not end in time, .*|no more scores of metric judge: .*"
)


def can_be(way: str, fault: Fault) -> bool:
    """Whether a fault's place is reached on its rank."""
    if (way, fault.stage, fault.kind) == ("beside", "gather", "nan"):
        return False  # the copy is compared before training goes on, and the sharded model answers from then on
    if fault.stage == "gather":  # without a copy there is none; who keeps none can only fail before it
        return way != "sharded" and not (way in ALONE and fault.rank == 1)
    if fault.stage == "exchange":
        return way not in ALONE
    return way not in ALONE or fault.rank == 0 or fault.stage == "prepare"


def kept(way: str, fault: Fault) -> tuple[int, int]:
    """The fewest and most samples that a round with the fault leaves."""
    whole, none, share = (NUM_SAMPLES, NUM_SAMPLES), (0, 0), (1, NUM_SAMPLES - 1)
    if fault.stage in ("scoring", "metric", "console") or fault.kind in ("nan", "delay", "hang"):
        return whole
    if fault.kind == "oom_once":  # a batch is halved, but not in the middle of what all ranks do in step
        return none if way == "sharded" else whole
    if fault.stage in ("prefill", "decode") and fault.kind == "exception" and way not in ALONE:
        return share  # of the other rank
    return none


def num_told(way: str, fault: Fault) -> int:
    """The number of warnings that say why."""
    if (way, fault.stage, fault.kind) == ("beside", "gather", "oom"):
        return 2  # that training waits for the answers, and then that there are none
    # NaN and a process that ended are told in other words, and where half a batch does there is nothing to tell.
    return fault.kind not in ("nan", "death", "oom_once") or kept(way, fault) == (0, 0)


def told_as(fault: Fault) -> str:
    """What a warning says of it. A rank whose answers cannot be sent cannot say why, but at DEBUG."""
    cannot_be_sent = fault.stage == "exchange" and fault.rank != 0
    return f"rank {fault.rank}: what it found could not be sent" if cannot_be_sent else fault.text


@dataclass(frozen=True)
class Faulty:
    way: str
    run: ForkedRun
    off: ForkedRun
    faults: list[Fault]
    num_steps: int
    by_rank: list[dict[str, Any]]

    def num_samples(self, step: int) -> int:
        """Of a round's file, which is valid; 0 where there is none."""
        path = self.run.generations / f"step_{step:08d}.jsonl"
        if not path.exists():
            return 0
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
        assert rest == ""
        records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
        keys = [(record["index"], record["strategy"], record["completion"]) for record in records]
        assert len(keys) == len(set(keys))
        assert {record["step"] for record in records} == {step}
        return len(records)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request) -> tuple[str, str]:
    return request.param


@dataclass(frozen=True)
class Trainer:
    """What all runs have in common."""

    server: TrainerServer
    assets: Assets
    overrides: Sequence[str] = ()
    before: str = ""


@pytest.fixture(scope="module")
def trainer(server, assets) -> Trainer:
    return Trainer(server, assets)


def run_with(
    trainer: Trainer,
    directory: Path,
    case: tuple[str, str],
    faults: Sequence[Fault],
    *,
    num_faulty: int,
    limit_s: float,
) -> Faulty:
    """A run with the faults, and one of as many steps without generation.

    Args:
        num_faulty: Rounds running with each fault; behind them lies one without.
        limit_s: Of a round.
    """
    way, fsdp = case
    period = num_faulty + 1
    placed = [replace(fault, steps=[period * i + k for k in range(1, period)]) for i, fault in enumerate(faults)]
    num_steps = period * len(placed)
    training = [
        *trainer.assets.overrides(multiturn=True), strategy(fsdp), *trainer.overrides, "trainer.test_freq=1",
        "trainer.save_freq=-1", f"trainer.total_training_steps={num_steps}", "trainer.total_epochs=1000",
    ]  # fmt: skip
    generation = [
        *WAYS[way], "+generation.max_new_tokens=5", "+generation.strategies={plain: {}, likeliest: {best_of: 2}}",
        f"+generation.max_round_time_s={limit_s}", f"+generation.metrics=['{HERE / 'planting.py'}:judge']",
    ]  # fmt: skip
    before = SEED_AND_REPORT + trainer.before
    off = trainer.server.run(directory / "off", training, num_ranks=2, before=before)
    on = trainer.server.run(
        directory / "on", [*training, *generation], num_ranks=2, before=before + BEFORE,
        environment=in_environment(placed, DELAY_S),
    )  # fmt: skip
    for run in (off, on):
        assert run.returncode == 0, run.output[-5000:]
    by_rank = [notes_of(on.directory, rank) for rank in range(2)]
    return Faulty(way, on, off, placed, num_steps, by_rank)


def assert_training_went_on(faulty: Faulty) -> None:
    """As without generation, random states included, and to a quick end; and that every fault happened."""
    for key in ("train/loss", "val/loss"):
        assert len(faulty.run.logged(key)) == faulty.num_steps
        assert faulty.run.logged(key) == faulty.off.logged(key)
    states, expected = (random_states(run) for run in (faulty.run, faulty.off))
    assert len(states) == len(faulty.by_rank)
    assert list(differences(states, expected)) == []
    exit_s = faulty.run.ended_at - max(rank["ended_at"] for rank in faulty.by_rank)
    record_figure(f"faults, {faulty.way}", exit_s=exit_s, num_faults=len(faulty.faults))
    assert exit_s < MAX_EXIT_S + MARGIN_S
    for fault in faulty.faults:
        struck = faulty.by_rank[fault.rank]["struck"]
        if fault.stage == "metric":
            struck = judged_steps(faulty.run.directory)
        assert set(fault.steps) <= set(struck), fault


def seconds(faulty: Faulty, step: int, fault: Fault | None = None) -> float:
    """That the round took; rank 1 waits where rank 0 lets the metrics be loaded before it begins."""
    ranks = faulty.by_rank[:1] if fault is not None and fault.stage == "metric" else faulty.by_rank
    return max(rank["round_s"][str(step)] for rank in ranks)


def scores(faulty: Faulty, step: int) -> list[Any]:
    """What the metric said of each sample; "" where it said nothing."""
    return [sample["scores"].get("judge", "") for sample in faulty.run.samples(step)]


def faults_of(case: tuple[str, str], faults: Sequence[Fault], cases: Sequence[tuple[str, str]] = CASES) -> list[Fault]:
    """All that can be in this case; of a part of the cases, every fault in one."""
    if IS_WHOLE:
        return [fault for fault in faults if can_be(case[0], fault)]
    in_turn = itertools.cycle(cases)
    return [fault for fault in faults if case == next(one for one in in_turn if can_be(one[0], fault))]


@pytest.fixture(scope="module")
def raised(trainer, tmp_path_factory, case) -> Faulty:
    """A run with what raises, and with NaN."""
    faults = [
        *(Fault(stage, kind, rank) for stage, kinds in ON_ALL_RANKS.items() for kind in kinds for rank in (0, 1)),
        *(Fault(stage, kind) for stage, kinds in ON_LOGGING_RANK.items() for kind in kinds),
    ]
    return run_with(
        trainer, tmp_path_factory.mktemp("raised"), case, faults_of(case, faults), num_faulty=2, limit_s=60.0
    )


def test_what_raises_costs_its_round_at_most_and_a_warning(raised):
    assert_training_went_on(raised)
    for fault in raised.faults:
        fewest, most = kept(raised.way, fault)
        for step in fault.steps:
            assert fewest <= raised.num_samples(step) <= most, fault
        told = [line for line in raised.run.warnings if told_as(fault) in line]
        assert len(told) == num_told(raised.way, fault), fault
    clean = set(range(1, raised.num_steps + 1)) - {step for fault in raised.faults for step in fault.steps}
    assert {raised.num_samples(step) for step in clean} == {NUM_SAMPLES}
    assert {type(score) for step in clean for score in scores(raised, step)} == {float}
    for fault in raised.faults:
        if fault.stage == "metric":
            expected = {None} if fault.kind == "nan" else {""}
            assert all(set(scores(raised, step)) == expected for step in fault.steps), fault

    of_faults = {told_as(fault) for fault in raised.faults}
    others = [
        line for line in raised.run.warnings if not (LATE.fullmatch(line) or any(text in line for text in of_faults))
    ]
    expected = Counter(re.sub(r"\d+", "#", re.split("[:,]", line)[0]) for line in others)
    kinds = {(fault.stage, fault.kind) for fault in raised.faults}
    assert expected == {
        text: 1
        for text, is_among in {
            "metric judge ended the process that it ran in": ("metric", "death") in kinds,
            "# of # answers at step # say nothing": not kinds.isdisjoint(
                (stage, "nan") for stage in ("gather", "prefill", "decode")
            ),
        }.items()
        if is_among
    }
    assert len(raised.run.warnings) == len(set(raised.run.warnings))

    slowest = max(seconds(raised, step) for fault in raised.faults for step in fault.steps)
    median = statistics.median(seconds(raised, step) for step in clean)
    record_figure(f"what raises, {raised.way}", slowest_round_s=slowest, median_round_s=median)
    assert slowest < median + 1 + MARGIN_S


@pytest.fixture(scope="module")
def delayed(trainer, tmp_path_factory, case) -> Faulty:
    """A run with what takes longer than a round may: at each stage on one of the ranks, or on both in turn."""
    faults = [
        *(
            Fault(stage, "delay", rank)
            for number, stage in enumerate(ON_ALL_RANKS)
            for rank in ((0, 1) if IS_WHOLE else (number % 2,))
        ),
        *(Fault(stage, "delay") for stage in ON_LOGGING_RANK),
        Fault("metric", "hang"),
        Fault("console", "hang"),  # at the end, for they hold their trackers for good
        Fault("jsonl", "hang"),
    ]
    if case not in IN_TIME:
        pytest.skip("what its thread takes is no time of the round's call")
    of_case = faults_of(case, faults, IN_TIME)
    return run_with(trainer, tmp_path_factory.mktemp("delayed"), case, of_case, num_faulty=1, limit_s=LIMIT_S)


def test_what_takes_too_long_costs_the_rest_of_its_round(delayed):
    assert_training_went_on(delayed)
    written_until = min(
        (fault.steps[0] for fault in delayed.faults if (fault.stage, fault.kind) == ("jsonl", "hang")), default=math.inf
    )
    for step in range(1, delayed.num_steps + 1):
        assert delayed.num_samples(step) == (NUM_SAMPLES if step < written_until else 0), step
    assert [
        line for line in delayed.run.warnings if not LATE.fullmatch(line) and not LATE_METRICS.fullmatch(line)
    ] == []
    assert len(delayed.run.warnings) == len(set(delayed.run.warnings))
    in_metric = [fault for fault in delayed.faults if fault.stage == "metric"]
    told = [line for line in delayed.run.warnings if line.startswith("metric judge did not end in time, ")]
    assert len(told) == bool(in_metric)
    assert all(set(scores(delayed, step)) == {""} for fault in in_metric for step in fault.steps)
    for fault in delayed.faults:
        (step,) = fault.steps
        taken = seconds(delayed, step, fault)
        waited = DELAY_S if fault.kind == "delay" and fault.stage not in ("metric", "jsonl", "console") else 0.0
        record_figure(f"{fault.kind} in {fault.stage}, {delayed.way}", round_s=taken, delay_s=waited, limit_s=LIMIT_S)
        assert waited <= taken < waited + LIMIT_S + 1 + MARGIN_S, fault
        if fault.stage in ("prepare", "gather", "prefill", "decode"):
            # The rest of the round is dropped: all answers, or those that had not ended.
            finish_reasons = {sample["finish_reason"] for sample in delayed.run.samples(step)}
            assert "time" in finish_reasons, fault
            if fault.stage in ("prepare", "gather"):
                assert finish_reasons == {"time"}, fault
