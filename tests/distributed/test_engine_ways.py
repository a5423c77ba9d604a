"""An engine of others answers: checked in every round, and where it fails the next way answers that round."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import assets
import pytest
import torch
import torch.distributed as dist
from distributed.test_proven import ask, counted_reads, small_host
from distributed.test_rounds import Rows, SmallHost, warnings_of_rounds
from distributed.testing import run_distributed
from torch import nn

from verl_valgen import backends
from verl_valgen.backends.base import Backend, Loader, WeightSource, Work
from verl_valgen.backends.hf import HFBackend
from verl_valgen.backends.judging import logprobs
from verl_valgen.collectives import agree
from verl_valgen.records import Completion, Request
from verl_valgen.rounds.proven import ProvenAnswerer
from verl_valgen.rounds.reading import read_by_copy
from verl_valgen.rounds.rounds import ValidationRounds
from verl_valgen.settings.load import GenerationSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("engine")
    assets.write_model(path / "model", hidden_size=32, intermediate_size=64)
    return path


# The engine


class SomeLoader(Loader):
    """Keeps what stands for an engine; `faults` are those of the next rounds, of which none has but one."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.num_loads = self.num_releases = 0

    def load(self, source: WeightSource, work: Work) -> nn.Module | None:
        self.num_loads += 1
        fault = self.faults.pop(0) if self.faults else ""
        model = source.gather(work.dtype, keep=bool(work.share))
        if fault == "load" or fault == f"load on rank {dist.get_rank()}":
            raise RuntimeError("planted in the loader")
        if model is not None:
            model.fault = fault
            if fault == "weights":  # as if it had kept others
                model.model.norm.weight.data.mul_(30)
                model.lm_head.weight.data.copy_(model.lm_head.weight.flip(0))
        return model

    def release(self) -> None:
        self.num_releases += 1


class SomeEngine(Backend):
    """Draws by noise of its own, and says with what probabilities."""

    loader = SomeLoader

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        if self.model.fault == f"answers on rank {dist.get_rank()}":
            raise RuntimeError("planted in the answers")
        drawn = HFBackend(self.model, self.tokenizer, self.seed + 1, self.limits).generate(requests)
        pairs = zip(requests, drawn, strict=True)
        return [replace(answer, logprobs=self._logprobs(request, answer.output_ids)) for request, answer in pairs]

    def _logprobs(self, request: Request, output_ids: list[int]) -> list[float]:
        (logits,) = read_by_copy(self.model, [[*request.input_ids, *output_ids[:-1]]], [len(output_ids)])
        return logprobs(logits, output_ids).tolist()


@contextmanager
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.BACKENDS, "vllm", f"{__name__}:SomeEngine")
        yield


def with_faults(answerer: ProvenAnswerer, faults: Sequence[str]) -> SomeLoader:
    loader = SomeLoader()
    loader.faults = list(faults)
    answerer.answerer.loaders["vllm"] = loader
    return loader


# Rounds with it

KINDS: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "right": (("", ""), {}),
    "greedy": (("", ""), {"do_sample": False}),
    "first": (("", ""), {"verify": "first"}),
    "off": (("", "weights"), {"verify": False}),
    "alone": (("", ""), {"ranks": 1}),
    "together": (("", ""), {"tensor_parallel": 2}),
    "load": (("load", "load"), {}),
    "load on rank 0": (("load on rank 0", ""), {}),
    "load on rank 1": (("load on rank 1", ""), {}),
    "answers on rank 0": (("answers on rank 0", ""), {}),
    "answers on rank 1": (("answers on rank 1", ""), {}),
    "weights": (("weights", ""), {}),
    "later": (("", "weights"), {"verify": "first"}),
    "later, greedy": (("", "weights"), {"verify": "first", "do_sample": False}),
}
"""The faults of two rounds, and settings."""
FAILING = ["load", "load on rank 0", "load on rank 1", "answers on rank 0", "answers on rank 1"]


def two_rounds(host: SmallHost, kind: str) -> dict[str, Any]:
    faults, chosen = KINDS[kind]
    settings = GenerationSettings(**{"enabled": True, "backend": "vllm", "max_new_tokens": 8, "ranks": 2} | chosen)
    answerer = ProvenAnswerer(host, settings)
    loader = with_faults(answerer, faults)
    ways: list[str] = []
    begin = answerer.answerer.begin
    answerer.answerer.begin = lambda requests, way, *args: (  # type: ignore[method-assign]
        ways.append(way.name),
        begin(requests, way, *args),
    )[1]
    with warnings_of_rounds() as records, counted_reads() as reads:
        rounds = [ask(answerer) for _ in faults]
    return {
        "verified": [answers and answers.verified for answers in rounds],
        "texts": [answers and [one.output_ids for one in answers.completions] for answers in rounds],
        "ways": ways,
        "warnings": records,
        "reads": len(reads),
        "is_asleep": loader.num_loads == loader.num_releases > 0,
        "met": agree(True, CPU),
    }


def of_all_kinds(directory: Path) -> dict[str, Any]:
    host = small_host(directory)
    with registered():
        return {kind: two_rounds(host, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def outcomes(directory, tmp_path_factory) -> list[dict[str, Any]]:
    return run_distributed(of_all_kinds, 2, tmp_path_factory.mktemp("ways"), directory)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ranks_go_the_same_ways_and_the_engine_sleeps_after_every_round(outcomes, kind):
    first, second = (outcome[kind] for outcome in outcomes)
    for key in ("ways", "reads", "is_asleep", "met"):
        assert first[key] == second[key], key
    assert first["is_asleep"]
    assert second["warnings"] == []
    assert second["verified"] == [None, None]


@pytest.mark.parametrize("kind", ["right", "greedy", "first", "alone", "together"])
def test_right_answers_pass_in_every_round_whatever_noise_has_drawn_them(outcomes, kind):
    first = outcomes[0][kind]
    assert first["ways"] == ["vllm", "vllm"]
    assert first["verified"] == [True, True]
    assert first["reads"] == 2, "it is filled anew in every round"
    assert first["warnings"] == []
    assert first["texts"] == [outcomes[0]["greedy" if kind == "greedy" else "right"]["texts"][0]] * 2
    assert all(first["texts"][0])


def test_the_check_can_be_had_not_at_all(outcomes):
    first = outcomes[0]["off"]
    assert (first["verified"], first["reads"], first["ways"]) == ([None, None], 0, ["vllm", "vllm"])
    assert all(all(texts) for texts in first["texts"])


@pytest.mark.parametrize("kind", FAILING)
def test_an_engine_that_fails_costs_one_warning_and_the_round_is_answered(outcomes, kind):
    first = outcomes[0][kind]
    assert first["verified"] == [True, True]
    assert all(all(texts) for texts in first["texts"])
    assert first["ways"] == ["vllm", "fast", "vllm", *(["fast"] if kind == "load" else [])]
    assert first["reads"] == 2
    (warning,) = first["warnings"]
    where = "rank 1: " if kind.endswith("1") else ""
    what = "answers" if kind.startswith("answers") else "loader"
    assert warning.startswith("generation.backend=vllm: ")
    assert f"{where}RuntimeError: planted in the {what}" in warning
    assert warning.endswith("; the answers are made by fast")


def test_an_engine_with_other_weights_is_not_asked_again(outcomes):
    first = outcomes[0]["weights"]
    assert first["ways"] == ["vllm", "fast", "fast"]
    assert first["verified"] == [True, True]
    (warning,) = first["warnings"]
    assert warning.startswith("the answers of LlamaForCausalLM (vllm) failed the check: ")
    assert "tokens were drawn by other probabilities than the trainer's model gives them" in warning
    assert warning.endswith("the answers were made again, and will be from now on: fast")


@pytest.mark.parametrize("kind", ["later", "later, greedy"])
def test_other_weights_are_found_in_any_round_also_where_the_first_is_to_be_checked(outcomes, kind):
    first = outcomes[0][kind]
    assert first["ways"] == ["vllm", "vllm", "fast"]
    assert first["verified"] == [True, True]
    assert len(first["warnings"]) == 1
    assert first["texts"][1] != outcomes[0]["off"]["texts"][1]


# Where the trainer's model gives no logits

OUTPUTS = {"all": (0, 1), "rank 1": (1,), "none": ()}


def by_verls_own_forward(directory: Path) -> dict[str, Any]:
    """Which ranks have its output is verl's choice."""
    host, results = small_host(directory), {}
    settings = GenerationSettings(enabled=True, backend="vllm", max_new_tokens=8)
    for with_outputs, ranks in OUTPUTS.items():

        def mean_logprob(input_ids: Any, output_ids: Any, ranks: Any = ranks) -> float | None:
            (logits,) = host.read([input_ids], [len(output_ids)])
            return logprobs(logits, output_ids).mean().item() if dist.get_rank() in ranks else None

        host.mean_logprob = mean_logprob  # type: ignore[method-assign]
        host.why_not_sharded = lambda: "there are no logits"  # type: ignore[method-assign]
        for fault in ("", "weights"):
            answerer = ProvenAnswerer(host, settings)
            with registered(), warnings_of_rounds() as records:
                with_faults(answerer, [fault])
                answers = ask(answerer)
            results[with_outputs, fault] = (answers and answers.verified, [way.name for way in answerer.ways], records)
            assert agree(True, CPU)
    return results


def test_where_there_are_no_logits_the_log_probabilities_are_compared_with_verls_own_forward(directory, tmp_path):
    first, second = run_distributed(by_verls_own_forward, 2, tmp_path, directory)
    for with_outputs in ("all", "rank 1"):
        verified, ways, warnings = first[with_outputs, ""]
        assert (verified, ways[0], warnings) == (True, "vllm", [])
        verified, ways, (warning,) = first[with_outputs, "weights"]
        assert (verified, ways[0]) == (True, "fast")
        assert "(vllm) failed the check: the answer came with a mean log-probability of -" in warning
        assert ", the trainer's model gives it -" in warning
    for fault in ("", "weights"):
        assert first["none", fault] == (None, first["all", ""][1], []), "nothing to compare with"
    assert {key: ways for key, (_, ways, _) in first.items()} == {key: ways for key, (_, ways, _) in second.items()}


# Beside training


def with_overlap(directory: Path, here: Path) -> dict[str, Any]:
    host = SmallHost(directory, here, Rows())
    settings = GenerationSettings(enabled=True, overlap=True, backend="vllm", max_new_tokens=4, max_val_samples=3)
    lines, beside = [], []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("verl_valgen.rounds.proven")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    rounds = ValidationRounds(host, settings)
    with registered(), warnings_of_rounds() as records, rounds:
        for step in (1, 2):
            host.at_batch()
            host.rounds(step)
            beside.append(rounds.is_unsettled)
    return {"lines": lines, "warnings": records, "beside": beside, "met": agree(True, CPU)}


def test_training_waits_for_an_engine_and_is_told_why_once(directory, tmp_path):
    first, second = run_distributed(with_overlap, 2, tmp_path, directory, tmp_path)
    assert first["lines"] == [
        "generation.overlap: training waits for the answers: generation.backend=vllm takes the memory and the time of "
        "training"
    ]
    assert second["lines"] == first["warnings"] == second["warnings"] == []
    assert first["beside"] == second["beside"] == [False, False]
    files = sorted(path.name for path in (tmp_path / "generations").glob("step_*.jsonl"))
    assert files == ["step_00000001.jsonl", "step_00000002.jsonl"]
    assert all('"verified": true' in path.read_text() for path in (tmp_path / "generations").glob("step_*.jsonl"))
