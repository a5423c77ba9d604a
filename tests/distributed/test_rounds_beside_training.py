"""Training goes on while rank 0 answers: what two ranks do, without a trainer around them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import assets
import pytest
import torch
import torch.distributed as dist
from distributed.test_proven import wrong_tokens, wrong_weights
from distributed.test_rounds import Rows, SmallHost, warnings_of_rounds
from distributed.testing import run_distributed

from verl_valgen.backends import SHARDED
from verl_valgen.backends.hf import HFBackend
from verl_valgen.collectives import agree
from verl_valgen.rounds import overlap as overlap_module
from verl_valgen.rounds.links import texts_to_read
from verl_valgen.rounds.overlap import TrainingMemory
from verl_valgen.rounds.reading import Finding
from verl_valgen.rounds.recorder import Recorder
from verl_valgen.rounds.rounds import ValidationRounds
from verl_valgen.settings.load import GenerationSettings
from verl_valgen.weights.plain_copy import PlainCopy

CPU = torch.device("cpu")
STEPS = (1, 2, 3, 4)
"""The last is the last of training, too."""
NUM_ROUNDS = {"early end": 2, "early end, wrong": 1}
BATCH = {"input_ids": torch.arange(5, 25).reshape(2, 10)}


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("planted")


def lack_memory(*args: Any) -> None:
    raise torch.OutOfMemoryError("planted: tried to allocate 2.00 GiB")


def once(original: Callable[..., Any], planted: Callable[..., Any] = fail) -> Callable[..., Any]:
    """`planted` at the first call."""
    calls: list[int] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return (planted if len(calls) == 1 else original)(*args, **kwargs)

    return call


def plant(kind: str, patch: pytest.MonkeyPatch) -> None:
    """On rank 0 alone."""
    if kind == "thread":
        patch.setattr(HFBackend, "generate", once(HFBackend.generate))
    if kind == "exit in the thread":
        patch.setattr(HFBackend, "generate", once(HFBackend.generate, lambda *args: exit(3)))
    if kind == "ready":
        patch.setattr(HFBackend, "make_ready", once(HFBackend.make_ready))
    if kind == "no room":
        patch.setattr(HFBackend, "make_ready", lack_memory)
    if kind == "no thread":
        patch.setattr(overlap_module.threading.Thread, "start", once(threading.Thread.start))
    if kind == "no room for a copy":
        patch.setattr(PlainCopy, "receive", once(PlainCopy.receive, lack_memory))
    if kind == "gather":
        patch.setattr(PlainCopy, "receive", once(PlainCopy.receive))
    if kind == "tokenizer":
        patch.setattr("verl_valgen.rounds.proven.texts_to_read", once(texts_to_read, lambda *args: []))
    if kind == "memory":
        patch.setattr(TrainingMemory, "free_bytes", lambda self: 1000.0)
    if kind == "copy":
        patch.setattr(PlainCopy, "finish", wrong_weights)
    if kind == "judge":
        patch.setattr(Recorder, "judge", once(Recorder.judge))
    if kind in ("padding", "judge", "early end, wrong"):
        patch.setattr(HFBackend, "generate_batch", wrong_tokens)


def close_the_sharded_model(patch: pytest.MonkeyPatch) -> None:
    """On all ranks: as with fused kernels."""
    patch.setattr(SmallHost, "why_not_sharded", lambda self: "there are no logits")


OTHERS = ("before training", "tokenizer", "exit in the thread", "early end", "judge")
SETTINGS: dict[str, dict[str, Any]] = {
    "unchecked": {"verify": False},
    "first": {"verify": "first"},
    "fast": {"backend": "fast", "best_of": 2},
}
CAPTURED: dict[str, dict[str, Any]] = {
    "cache": {"extra": {"cache_implementation": "static"}},
    "chunks": {"extra": {"prefill_chunk_size": 4}},
}


def make_rounds(directory: Path, here: Path, **chosen: Any) -> tuple[SmallHost, ValidationRounds]:
    host = SmallHost(directory, here, Rows())
    chosen = {"max_new_tokens": 6, "max_val_samples": 3, "backend": "hf", **chosen}
    settings = GenerationSettings(enabled=True, overlap=True, **chosen)
    return host, ValidationRounds(host, settings)


def four_rounds(directory: Path, here: Path, kind: str) -> dict[str, Any]:
    """Four rounds with a fault on rank 0; afterwards both ranks must still meet."""
    host, rounds = make_rounds(directory, here, **(SETTINGS | CAPTURED).get(kind, {}))
    state = torch.get_rng_state()
    beside = []
    with warnings_of_rounds() as records, pytest.MonkeyPatch.context() as patch, rounds:
        if dist.get_rank() == 0:
            plant(kind, patch)
        for step in STEPS[: NUM_ROUNDS.get(kind, 4)]:
            if kind != "before training" or step > 1:
                host.at_batch()
            host.rounds(step)
            beside.append(rounds.is_unsettled)
            # The others are waited for by what comes next: a round, or the end.
            if rounds.under_way is not None and step == 2 and kind != "early end":
                assert rounds.under_way.answers.wait(50)
                host.at_batch()
                assert rounds.under_way is None
    return {
        "warnings": records,
        "beside": beside,
        "ways": [way.name for way in rounds.answerer.proven.ways],
        "met": agree(True, CPU),
        "random": torch.equal(state, torch.get_rng_state()),
    }


def of_all_kinds(directory: Path) -> dict[str, dict[str, Any]]:
    kinds = ("none", *WARNINGS, *SETTINGS, *OTHERS)
    return {kind: four_rounds(directory, directory / kind, kind) for kind in kinds}


WARNINGS = {
    "thread": "no samples of the validation at step 1: RuntimeError: planted; training goes on",
    "ready": "no samples at this validation: RuntimeError: planted; training goes on",
    "no thread": "no samples at this validation: RuntimeError: planted; training goes on",
    "gather": "no samples at this validation: RuntimeError: planted; training goes on",
    "memory": "generation.overlap: training waits for the answers: beside training a round needs 0.0 GiB on each ",
    "no room": "generation.overlap: training waits for the answers: torch.OutOfMemoryError: planted: ",
    "no room for a copy": "generation.overlap: training waits for the answers: torch.OutOfMemoryError: planted: ",
    "cache": "generation.overlap: training waits for the answers: transformers may compile and capture what runs with ",
    "chunks": "generation.overlap: training waits for the answers: transformers may compile and capture what ",
    "copy": "the answers of LlamaForCausalLM (hf) failed the check: the copy is not the trainer's model: ",
    "padding": "the answers of LlamaForCausalLM (hf) failed the check: ",
    "early end, wrong": "the answers of LlamaForCausalLM (hf) failed the check: ",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("overlap")
    assets.write_model(path / "model", hidden_size=32, intermediate_size=64)
    return path


@pytest.fixture(scope="module")
def outcomes(directory) -> list[dict[str, dict[str, Any]]]:
    return run_distributed(of_all_kinds, 2, directory, directory)


def records_of(here: Path) -> dict[int, list[dict[str, Any]]]:
    lines = {path: path.read_text().splitlines() for path in sorted(here.glob("generations/step_*.jsonl"))}
    return {int(path.stem.removeprefix("step_")): [json.loads(line) for line in lines[path]] for path in lines}


def verdicts(here: Path) -> dict[int, Any]:
    return {step: records[0]["verified"] for step, records in records_of(here).items()}


@pytest.mark.parametrize("kind", ["none", *WARNINGS, *SETTINGS, *OTHERS])
def test_both_ranks_do_the_same_and_leave_random_states(outcomes, kind):
    first, second = (outcome[kind] for outcome in outcomes)
    for key in ("beside", "ways", "met", "random"):
        assert first[key] == second[key], key
    assert first["met"]
    assert first["random"]
    assert second["warnings"] == []


@pytest.mark.parametrize("kind", WARNINGS)
def test_a_failure_costs_one_warning(outcomes, kind):
    (warning,) = outcomes[0][kind]["warnings"]
    assert warning.startswith(WARNINGS[kind])


def test_the_last_round_is_waited_for_and_all_are_recorded_with_their_steps(outcomes, directory):
    assert outcomes[0]["none"]["beside"] == [True, True, True, False]
    assert outcomes[0]["none"]["warnings"] == []
    records = records_of(directory / "none")
    assert [(step, record["step"]) for step, round in records.items() for record in round] == [
        (step, step) for step in STEPS for _ in range(3)
    ]
    texts = [[record["generation"] for record in round] for round in records.values()]
    assert texts[0] == texts[1] == texts[2] == texts[3]  # the weights are the same; the last is an ordinary round
    assert any(texts[0])
    assert verdicts(directory / "none") == dict.fromkeys(STEPS, True)


def test_the_end_of_training_waits_for_what_is_under_way(outcomes, directory):
    assert outcomes[0]["early end"]["beside"] == [True, True]
    assert verdicts(directory / "early end") == {1: True, 2: True}


def test_the_round_before_training_is_waited_for(outcomes):
    assert outcomes[0]["before training"]["beside"] == [False, True, True, False]


@pytest.mark.parametrize("kind", ["thread", "ready", "no thread", "gather", "exit in the thread"])
def test_after_a_failure_the_next_round_is_complete(outcomes, directory, kind):
    beside = outcomes[0][kind]["beside"]
    assert beside == [kind in ("thread", "no thread", "exit in the thread"), True, True, False]
    assert {step: len(round) for step, round in records_of(directory / kind).items()} == {2: 3, 3: 3, 4: 3}


@pytest.mark.parametrize("kind", ["memory", "no room", *CAPTURED])
def test_where_memory_lacks_or_something_may_be_captured_training_waits(outcomes, directory, kind):
    assert outcomes[0][kind]["beside"] == [False] * 4
    assert verdicts(directory / kind) == dict.fromkeys(STEPS, True)


def test_where_memory_lacks_for_the_copy_that_round_is_waited_for(outcomes, directory):
    assert outcomes[0]["no room for a copy"]["beside"] == [False, True, True, False]
    assert verdicts(directory / "no room for a copy") == dict.fromkeys(STEPS, True)


def test_a_wrong_copy_is_found_before_training_goes_on(outcomes, directory):
    assert outcomes[0]["copy"]["beside"] == [False] * 4
    assert outcomes[0]["copy"]["ways"] == ["the sharded model, one prompt at a time"]
    assert verdicts(directory / "copy") == dict.fromkeys(STEPS, True)  # made again at once


def test_wrong_answers_stay_and_the_next_ones_are_waited_for_another_way(outcomes, directory):
    first = outcomes[0]["padding"]
    assert first["beside"] == [True, False, True, False]
    assert first["ways"][0] == "hf, one prompt at a time"
    assert verdicts(directory / "padding") == {1: False, 2: True, 3: True, 4: True}
    (warning,) = first["warnings"]
    assert warning.endswith("the next ones are waited for, and made another way: hf, one prompt at a time")
    assert all(record["generation"] and record["scores"] == {} for record in records_of(directory / "padding")[1])


def test_what_was_found_of_answers_that_could_not_be_judged_counts(outcomes, directory):
    first, second = (outcome["judge"] for outcome in outcomes)
    assert first["beside"] == [True, False, True, False]
    assert first["ways"][0] == second["ways"][0] == "hf, one prompt at a time"
    failed, lost = first["warnings"]
    assert failed.startswith(WARNINGS["padding"])
    assert lost == "no samples of the validation at step 1: RuntimeError: planted; training goes on"
    assert verdicts(directory / "judge") == {2: True, 3: True, 4: True}


def test_the_links_can_be_had_once_or_not_at_all(outcomes, directory):
    for kind in SETTINGS:
        assert outcomes[0][kind]["beside"] == [True, True, True, False]
    assert verdicts(directory / "unchecked") == dict.fromkeys(STEPS, None)
    assert verdicts(directory / "first") == {1: True, 2: None, 3: None, 4: None}
    assert verdicts(directory / "fast") == dict.fromkeys(STEPS, True)
    assert outcomes[0]["fast"]["ways"][0] == "fast"


def test_where_no_text_can_be_read_the_answers_are_unchecked(outcomes, directory):
    found = verdicts(directory / "tokenizer")
    assert found[1] in (None, "")  # the first file makes room for the type that comes later
    assert (found[2], found[3], found[4]) == (True, True, True)
    assert outcomes[0]["tokenizer"]["beside"] == [True, True, True, False]


# Where no safer way is left


def with_one_way_left(
    directory: Path, here: Path, planted: dict[str, Finding], *, has_failed: bool = False, **chosen: Any
) -> dict[str, Any]:
    """Three rounds on the last way of a copy, with links that always find so."""
    host, rounds = make_rounds(directory, here, **chosen)
    beside = []
    with warnings_of_rounds() as records, pytest.MonkeyPatch.context() as patch, rounds:
        if has_failed:
            rounds.answerer.proven.failed = {SHARDED}
        elif not chosen:
            close_the_sharded_model(patch)
        rounds.answerer.proven.ways = rounds.answerer.proven.ways[1:]
        for name, finding in planted.items():
            patch.setattr(f"verl_valgen.rounds.proven.{name}", lambda *args, finding=finding: finding)
        for step in STEPS[:3]:
            host.at_batch()
            host.rounds(step)
            beside.append(rounds.is_unsettled)
    ways = [way.name for way in rounds.answerer.proven.ways]
    return {"beside": beside, "warnings": records, "ways": ways, "met": agree(True, CPU)}


# Ranks with different numbers of forward passes cannot go through the sharded model, either.
@pytest.mark.parametrize(
    ("chosen", "verified"), [({}, True), ({"extra": {"guidance_scale": 1.5}}, None)], ids=["no logits", "not in step"]
)
def test_the_last_way_that_can_be_taken_is_kept(directory, tmp_path, chosen, verified):
    planted = {"second_link": Finding(False, "planted")}
    outcomes = run_distributed(partial(with_one_way_left, **chosen), 2, tmp_path, directory, tmp_path, planted)
    for outcome in outcomes:
        assert outcome["beside"] == [True, False, True]  # what is waited for is checked again, and has not failed
        assert outcome["ways"][0] == "hf, one prompt at a time"
        assert outcome["met"]
    assert verdicts(tmp_path) == {1: False, 2: verified, 3: False}
    assert outcomes[0]["warnings"][0].endswith("made the same way, as there is no other")


@pytest.mark.parametrize("has_failed", [False, True], ids=["closed", "has failed"])
def test_a_copy_that_is_wrong_answers_unverified_where_no_other_way_is_left(directory, tmp_path, has_failed):
    planted = {"first_link": Finding(False, "planted: the copy")}
    run = partial(with_one_way_left, has_failed=has_failed)
    outcomes = run_distributed(run, 2, tmp_path, directory, tmp_path, planted)
    for outcome in outcomes:
        assert outcome["beside"] == [False] * 3
        assert outcome["met"]
    assert verdicts(tmp_path) == {1: False, 2: True, 3: False}  # what is waited for is checked again, and passes
    assert all(record["generation"] for round in records_of(tmp_path).values() for record in round)
    assert "planted: the copy; no safer way does better" in outcomes[0]["warnings"][0]


# What comes while a round is under way


def with_answers_that_wait(directory: Path, here: Path) -> dict[str, Any]:
    """Answers that come when they are told to, and others that never come: training ends with an error before."""
    host, rounds = make_rounds(directory, here)
    assert host.own_tokenizer is not host.tokenizer
    borrowed_by = []  # threads that look at the trainer's tokenizer

    class Watched(SmallHost):
        @property
        def tokenizer(self) -> Any:
            borrowed_by.append(threading.current_thread())
            return self.__dict__["tokenizer"]

        @tokenizer.setter
        def tokenizer(self, value: Any) -> None:
            self.__dict__["tokenizer"] = value

    host.__class__ = Watched
    may_answer = threading.Event()
    generate, threads = HFBackend.generate, []

    def generate_later(self: HFBackend, requests: Any) -> Any:
        threads.append(threading.current_thread())
        assert may_answer.wait(50)
        while len(threads) == 3:  # of the second round beside training
            torch.zeros(1)
        return generate(self, requests)

    seen: dict[str, Any] = {}

    def train() -> None:
        with rounds:
            host.at_batch()
            host.rounds(1)
            for _ in range(3):
                host.at_batch()
                assert agree(True, CPU)
            seen["while it waits"] = sorted(records_of(here))
            may_answer.set()
            seen["samples"] = [len(texts) for texts in rounds.generate_samples(BATCH)]
            seen["recorded"] = sorted(records_of(here))
            host.rounds(2)
            raise KeyError("training fails")

    with warnings_of_rounds() as records, pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFBackend, "generate", generate_later)
        with pytest.raises(KeyError):
            train()
    alive = [thread.is_alive() for thread in threads if thread is not threading.main_thread()]
    seen["borrowed by others"] = len(set(borrowed_by) - {threading.main_thread()})
    return seen | {"alive": alive, "warnings": records, "met": agree(True, CPU)}


def test_training_is_not_held_and_a_crash_of_it_loses_the_round_under_way(directory, tmp_path):
    first, second = run_distributed(with_answers_that_wait, 2, tmp_path, directory, tmp_path)
    assert first["while it waits"] == []
    assert first["recorded"] == [1]
    assert first["borrowed by others"] == 0
    assert (first["samples"], second["samples"]) == ([2, 2], [0, 0])
    assert sorted(records_of(tmp_path)) == [1]
    assert (first["alive"], second["alive"]) == ([False, False], [])
    assert first["warnings"] == ["no samples of the validation at step 2: training ended before they were there"]
    assert second["warnings"] == []
    assert first["met"]
    assert second["met"]
