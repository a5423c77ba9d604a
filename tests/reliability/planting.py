"""Faults in the rounds of a run of verl's trainer, which every rank plants before the trainer's program runs.

The environment says which: `FAULTS` is a JSON list of `Fault`'s fields, `DELAY_S` how long delays are. Metrics that are
to fail read the same, in their own process. A rank notes (`round_times.py`) the steps at which it was struck as well.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reliability.round_times import watch_rounds

_DECODES_FROM = 3
"""Of the passes of a round. The second would do as well, but that an answer may end with the first."""

_TO_FAIL_S = 2.0
"""That a metric has at least, less than a delay."""

_RAISING = ("exception", "oom", "oom_once")


@dataclass(frozen=True)
class Fault:
    """What goes wrong at a stage of some rounds on one rank."""

    stage: str
    """prepare, gather, prefill, decode, exchange, scoring, metric, jsonl, console."""
    kind: str
    """exception, oom, oom_once, nan, delay, hang, death."""
    rank: int = 0
    steps: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What the error says, and so the warning."""
        return f"planted {self.kind} in {self.stage} on rank {self.rank}"


def in_environment(faults: list[Fault], delay_s: float) -> dict[str, str]:
    return {"FAULTS": json.dumps([asdict(fault) for fault in faults]), "DELAY_S": str(delay_s)}


class Faults:
    """Those of this rank, and the round under way."""

    def __init__(self) -> None:
        rank = int(os.environ.get("RANK", "0"))
        planted = [Fault(**fields) for fields in json.loads(os.environ["FAULTS"])]
        self.by_step = {step: fault for fault in planted if fault.rank == rank for step in fault.steps}
        self.delay_s = float(os.environ["DELAY_S"])
        self._rounds = threading.local()
        self.calls: Counter[tuple[str, int]] = Counter()
        self.struck: set[int] = set()

    @property
    def step(self) -> int:
        """The round that this thread is in, -1 in training: a round may be answered while training goes on."""
        return getattr(self._rounds, "step", -1)

    @step.setter
    def step(self, step: int) -> None:
        self._rounds.step = step

    def strike(self, stage: str, step: int | None = None, *, kinds: tuple[str, ...] = ()) -> bool:
        """Does what is planted at a stage; whether numbers are to become NaN there.

        Args:
            step: None is the round under way.
            kinds: That may happen here; none are all.
        """
        step = self.step if step is None else step
        fault = self.by_step.get(step)
        if fault is None or fault.stage != stage or (kinds and fault.kind not in kinds):
            return False
        is_first = step not in self.struck
        self.struck.add(step)
        if fault.kind == "exception":
            raise RuntimeError(fault.text)
        if fault.kind == "oom" and stage == "metric":
            raise MemoryError(fault.text)  # there, torch would take seconds to import
        if fault.kind == "oom" or (fault.kind == "oom_once" and is_first):
            import torch

            # As CUDA's, whose numbers are others every time.
            raise torch.OutOfMemoryError(f"{fault.text}: tried to allocate {step}.5 GiB, {step + 7} MiB is free")
        if fault.kind == "delay" and is_first:
            time.sleep(self.delay_s)
        if fault.kind == "hang":
            threading.Event().wait()
        if fault.kind == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        return fault.kind == "nan"

    def strike_in_pass(self, place: str, *kinds: str) -> bool:
        """At prefill or decode, by the number of passes through a place in this round."""
        if self.step < 0:
            return False  # training
        self.calls[place, self.step] += 1
        is_decoding = self.calls[place, self.step] >= _DECODES_FROM
        return self.strike("prefill", kinds=kinds) or (is_decoding and self.strike("decode", kinds=kinds))


def plant() -> None:
    """Plants what the environment says.

    What fails within a pass through the sharded model loses the ranks to each other, as in training: so passes are
    delayed and give NaN, and what is raised is raised behind them, with and without a copy.
    """
    from transformers import LlamaForCausalLM

    from verl_valgen import collectives as exchange
    from verl_valgen.backends import hf, lockstep, sampling
    from verl_valgen.backends.fast import backend as fast
    from verl_valgen.backends.fast.choice import Choice
    from verl_valgen.rounds import generation as answering
    from verl_valgen.rounds import proven
    from verl_valgen.rounds.rounds import ValidationRounds
    from verl_valgen.scores.scoring import Scoring
    from verl_valgen.trackers.console import ConsoleTracker
    from verl_valgen.trackers.jsonl import JsonlTracker
    from verl_valgen.weights.plain_copy import PlainCopy

    faults = Faults()

    scorings: list[Any] = []
    make_scoring = Scoring.__init__

    def note_scoring(self: Any, *args: Any) -> None:
        make_scoring(self, *args)
        scorings.append(self)

    @contextmanager
    def in_round(step: int) -> Iterator[None]:
        fault = faults.by_step.get(step)
        if fault is not None and fault.stage == "metric" and fault.kind in ("delay", "hang"):
            # They were killed by the fault before this one, and a round gives them little time.
            wait_until_loaded(scorings[0])
        faults.step = step
        try:
            yield
        finally:
            faults.step = -1

    watch_rounds(in_round, lambda: {"struck": sorted(faults.struck)})

    def beside_training(
        self: Any, opened: Any, *args: Any, original: Any = ValidationRounds._answers_and_scores
    ) -> Any:
        with in_round(opened.step):
            return original(self, opened, *args)

    def receive(self: Any, name: str, parameter: Any, original: Any = PlainCopy.receive) -> None:
        is_nan = faults.strike("gather")
        original(self, name, parameter * float("nan") if is_nan else parameter)

    def forward(self: Any, *args: Any, original: Any = LlamaForCausalLM.forward, **kwargs: Any) -> Any:
        is_nan = faults.strike_in_pass("forward", "delay", "nan")
        output = original(self, *args, **kwargs)
        if is_nan:
            output.logits = output.logits * float("nan")
        return output

    noise = sampling.GumbelNoise.__call__

    def choose(self: Any, input_ids: Any, scores: Any) -> Any:  # transformers looks at the names
        faults.strike_in_pass("choose", *_RAISING)
        return noise(self, input_ids, scores)

    def choose_in_step(self: Any, *args: Any, original: Any = Choice.__call__) -> Any:
        faults.strike_in_pass("choose", *_RAISING)
        return original(self, *args)

    class Json:
        """json, where a rank's answers fail."""

        loads = staticmethod(json.loads)

        @staticmethod
        def dumps(value: Any) -> str:
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], list) and value[0]:
                faults.strike("exchange")
            return json.dumps(value)

    def score(self: Any, samples: Any, deadline: float, original: Any = Scoring.score) -> Any:
        faults.strike("scoring")
        fault = faults.by_step.get(faults.step)
        if fault is not None and fault.stage == "metric":  # whatever time the answers have left
            deadline = max(deadline, time.time() + _TO_FAIL_S)
        return original(self, samples, deadline)

    def unstruck(original: Any) -> Any:
        """The trial of a model, and the reading of answers: what fails there is not told, and no fault of this list."""

        def call(*args: Any, **kwargs: Any) -> Any:
            step, faults.step = faults.step, -1
            try:
                return original(*args, **kwargs)
            finally:
                faults.step = step

        return call

    def striking(stage: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            faults.strike(stage)
            return original(*args, **kwargs)

        return call

    def logging_rounds(stage: str, original: Any) -> Any:
        def log(self: Any, round: Any) -> None:
            faults.strike(stage, round.step)  # in a thread that may be late
            original(self, round)

        return log

    patched: Any
    for patched, name, replacement in (
        (answering, "free_bytes", striking("prepare", answering.free_bytes)),
        (PlainCopy, "receive", receive),
        (ValidationRounds, "_answers_and_scores", beside_training),
        (proven, "verify", unstruck(proven.verify)),
        (proven, "first_link", unstruck(proven.first_link)),
        (proven, "second_link", unstruck(proven.second_link)),
        (hf, "how_to_share", unstruck(hf.how_to_share)),
        (fast, "try_model", unstruck(fast.try_model)),
        (lockstep, "how_to_share", unstruck(lockstep.how_to_share)),
        (LlamaForCausalLM, "forward", forward),
        (sampling.GumbelNoise, "__call__", choose),
        (Choice, "__call__", choose_in_step),
        (exchange, "json", Json),
        (Scoring, "__init__", note_scoring),
        (Scoring, "score", score),
        (JsonlTracker, "log", logging_rounds("jsonl", JsonlTracker.log)),
        (ConsoleTracker, "log", logging_rounds("console", ConsoleTracker.log)),
    ):
        setattr(patched, name, replacement)


def wait_until_loaded(scoring: Any) -> None:
    process = scoring._process
    while not process.is_done and process._received.empty():
        time.sleep(0.01)


_JUDGED = Path("judged_steps.txt")


def judged_steps(directory: Path) -> set[int]:
    """Of the rounds of a run, those in which the metric began with a sample."""
    path = directory / _JUDGED
    return set(map(int, path.read_text().split())) if path.exists() else set()


def judge(sample: Any) -> float:
    """A metric that fails as is planted."""
    with _JUDGED.open("a") as file:
        print(sample.step, file=file)
    is_nan = Faults().strike("metric", sample.step)
    return float("nan") if is_nan else float(sample.num_new_tokens)
