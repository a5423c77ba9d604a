"""On any number of ranks, with a copy or through the sharded model: the same text, and nobody waits."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import assets
import pytest
import torch
import torch.distributed as dist
from distributed.test_gather import wrap
from distributed.test_rounds import Rows, SmallHost
from distributed.testing import run_distributed
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from verl_valgen.backends.hf import HFBackend
from verl_valgen.backends.sampling import GumbelNoise
from verl_valgen.collectives import agree, broadcast, gather_values, largest, smallest
from verl_valgen.records import Request
from verl_valgen.rounds import generation as answering_module
from verl_valgen.rounds import planning as planning_module
from verl_valgen.rounds.generation import Answerer
from verl_valgen.settings.load import GenerationSettings

CPU = torch.device("cpu")
REQUESTS = [Request([5 + (row * 7 + i) % 80 for i in range(3 + 5 * row)], (row, 0), {}) for row in range(9)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("answering")
    assets.write_model(path / "model", hidden_size=32, intermediate_size=64)
    return path


def answer(host: SmallHost, requests: list[Request] = REQUESTS, **settings: Any) -> Any:
    defaults = {"enabled": True, "max_new_tokens": 12, "top_p": 0.95}
    made = GenerationSettings(**(defaults | settings))
    with_parameters = [replace(request, params=made.parameters) for request in requests]
    completions = Answerer(host, made)(with_parameters if host.is_logging_rank else None)
    return completions and [(completion.output_ids, completion.finish_reason) for completion in completions]


def on_all_ways(directory: Path, logging_rank: int) -> dict[str, Any]:
    host = SmallHost(directory, directory, Rows())
    host.is_logging_rank = dist.get_rank() == logging_rank
    ways = {f"{ranks} ranks": {"ranks": ranks} for ranks in (1, 2, 4)}
    ways |= {f"batches of {size}": {"batch_size": size} for size in (1, 3, 8)}
    ways |= {"fast": {"backend": "fast", "batch_size": 3}}
    results = {name: answer(host, **settings) for name, settings in ways.items()}
    backwards = answer(host, REQUESTS[::-1], ranks=2)
    return results | {"backwards": backwards and backwards[::-1], "none": answer(host, [])}


@pytest.mark.parametrize(
    "world_sizes", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)], ids=["two-ranks", "four-ranks"]
)
def test_the_text_depends_neither_on_ranks_nor_on_batches_nor_on_order(directory, tmp_path, world_sizes):
    of_worlds = []
    for world_size in world_sizes:
        logging_rank = world_size // 2  # it need not be the first
        ranks = run_distributed(on_all_ways, world_size, tmp_path, directory, logging_rank, max_run_s=240.0)
        others = [result for rank, result in enumerate(ranks) if rank != logging_rank]
        assert all(value is None for other in others for value in other.values())
        assert ranks[logging_rank].pop("none") == []
        of_worlds += ranks[logging_rank].values()
    assert all(result == of_worlds[0] for result in of_worlds)
    assert len({tuple(ids) for ids, _ in of_worlds[0]}) == len(REQUESTS)


def through_the_sharded_model(directory: Path, strategy: str, lora: bool) -> tuple[Any, ...]:
    torch.manual_seed(0)
    host = SmallHost(directory, directory, Rows())
    model: Any = AutoModelForCausalLM.from_pretrained(directory / "model")
    if lora:
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    # In float32, so that the copy computes the same.
    host.model = wrap(model, strategy, param_dtype=torch.float32)
    host.model.train()
    with_a_copy = answer(host)
    state = torch.get_rng_state()
    sharded = [answer(host, gather="sharded", batch_size=size) for size in (1, 4)]
    fewer_than_ranks = answer(host, REQUESTS[:1], gather="sharded")
    beams = [answer(host, gather=gather, do_sample=False, extra={"num_beams": 2}) for gather in ("copy", "sharded")]
    in_time = answer(host, gather="sharded", max_round_time_s=1e-6)
    unchanged = torch.equal(state, torch.get_rng_state()) and all(module.training for module in host.model.modules())
    return with_a_copy, sharded, fewer_than_ranks, beams, in_time, unchanged


@pytest.mark.parametrize(
    ("strategy", "lora"),
    [
        pytest.param("fsdp", False, id="fsdp-full"),
        pytest.param("fsdp2", True, id="fsdp2-lora"),
        pytest.param("fsdp", True, id="fsdp-lora", marks=pytest.mark.slow),
        pytest.param("fsdp2", False, id="fsdp2-full", marks=pytest.mark.slow),
    ],
)
def test_through_the_sharded_model_it_is_the_same_text(directory, tmp_path, strategy, lora):
    args = (directory, strategy, lora)
    first, second = run_distributed(through_the_sharded_model, 2, tmp_path, *args, max_run_s=240.0)
    with_a_copy, sharded, fewer_than_ranks, beams, in_time, unchanged = first
    assert sharded == [with_a_copy] * 2
    assert fewer_than_ranks == with_a_copy[:1]
    assert beams[0] == beams[1]
    assert in_time == [([], "time")] * len(REQUESTS)
    assert unchanged
    assert second == (None, [None] * 2, None, [None] * 2, None, True)


KINDS = [
    {"do_sample": False, "max_new_tokens": 5},
    {"do_sample": True, "max_new_tokens": 9, "temperature": 1.0, "top_k": 50, "top_p": 0.9},
    {"do_sample": False, "max_new_tokens": 7, "num_beams": 2},
    {"do_sample": False, "max_new_tokens": 3, "exponential_decay_length_penalty": [1]},
]
FAILING = 1
"""A request of the last kind, among those of the first rank."""


def of_many_kinds(directory: Path) -> dict[str, Any]:
    """Uneven shares of uneven kinds, with and without log-probabilities."""
    host = SmallHost(directory, directory, Rows())
    host.model = wrap(AutoModelForCausalLM.from_pretrained(directory / "model"), "fsdp2", param_dtype=torch.float32)
    asked = [replace(one, params=KINDS[i // 4], wants_logprob=i in (5, 6, 7)) for i, one in enumerate(REQUESTS)]
    asked[FAILING] = replace(asked[FAILING], params=KINDS[-1])
    results = {}
    for name, settings in (("copy", {}), ("spread", {"ranks": 2, "batch_size": 2}), ("sharded", {"gather": "sharded"})):
        made = GenerationSettings(enabled=True, **settings)
        completions = Answerer(host, made)(asked if host.is_logging_rank else None)
        results[name] = completions and [(one.output_ids, one.mean_logprob) for one in completions]
        results[f"{name}: errors"] = completions and {i: one.error for i, one in enumerate(completions) if one.error}
    return results


def test_requests_of_many_kinds_on_all_ways(directory, tmp_path):
    first, second = run_distributed(of_many_kinds, 2, tmp_path, directory)
    assert set(second.values()) == {None}
    expected = first["copy"]
    assert [i for i, (_, logprob) in enumerate(expected) if logprob is not None] == [5, 6, 7]
    for way in ("copy", "spread", "sharded"):
        (failing,) = first[f"{way}: errors"].items()
        assert failing[0] == FAILING
        assert "IndexError" in failing[1]
    for way in ("spread", "sharded"):
        assert [ids for ids, _ in first[way]] == [ids for ids, _ in expected]
        for (_, found), (_, logprob) in zip(first[way], expected, strict=True):
            assert found == (None if logprob is None else pytest.approx(logprob, abs=1e-5))


class Panic(BaseException):
    """As what is written in Rust raises."""


def faults(directory: Path) -> dict[str, Any]:
    """Rank 1 fails in one way after the other; both ranks must still meet."""
    host = SmallHost(directory, directory, Rows())
    results: dict[str, Any] = {}

    def planted(*args: Any, **kwargs: Any) -> Any:
        raise kind("planted")

    for name, (target, attribute), settings in (
        ("prepare", (SmallHost, "on_device"), {}),
        ("decode", (HFBackend, "generate"), {"ranks": 2}),
        ("sharded", (GumbelNoise, "__call__"), {"gather": "sharded"}),
        ("panic", (HFBackend, "generate"), {"ranks": 2}),
    ):
        kind: type[BaseException] = Panic if name == "panic" else torch.OutOfMemoryError
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 1:
                patch.setattr(target, attribute, planted)
            try:
                results[name] = answer(host, **settings)
            except Exception as e:
                results[name] = f"{type(e).__name__}: {e}"
        results[f"{name}: met"] = agree(True, CPU)
    unspeakable = [replace(REQUESTS[0], params={"max_new_tokens": 2, "do_sample": False, "suppress_tokens": b"x"})]
    try:
        results["pack"] = Answerer(host, GenerationSettings(enabled=True))(
            unspeakable if host.is_logging_rank else None
        )
    except TypeError as e:
        results["pack"] = str(e)
    results["pack: met"] = agree(True, CPU)
    return results


def test_what_fails_on_another_rank_is_told_on_the_logging_rank(directory, tmp_path):
    first, second = run_distributed(faults, 2, tmp_path, directory)
    for name in ("prepare", "decode", "sharded", "panic"):
        error = f"RuntimeError: {Panic.__module__}.Panic" if name == "panic" else "torch.OutOfMemoryError"
        assert first[name] == f"OtherRankError: rank 1: {error}: planted"
        assert second[name] is None
        assert first[f"{name}: met"]
        assert second[f"{name}: met"]
    assert (first["pack"], second["pack"]) == ("Object of type bytes is not JSON serializable", None)
    assert first["pack: met"]
    assert second["pack: met"]


def with_little_memory(directory: Path) -> dict[str, Any]:
    """Free bytes as a device might have them: for everything; for no copy on rank 1; for nothing there."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("verl_valgen").addHandler(handler)
    host = SmallHost(directory, directory, Rows())
    host.model = wrap(AutoModelForCausalLM.from_pretrained(directory / "model"), "fsdp2", param_dtype=torch.float32)
    needs = host.num_parameters * 4
    settings = GenerationSettings(enabled=True, max_new_tokens=4, max_val_samples=3)
    answering = Answerer(host, settings)
    asked = [replace(one, params=settings.parameters) for one in REQUESTS[:3]]
    requests = asked if dist.get_rank() == 0 else None
    results: dict[str, Any] = {}
    for name, bytes_of_ranks in (("copy", (1e12, 1e12)), ("sharded", (1e12, needs)), ("nothing", (1e12, 1e3))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(answering_module, "free_bytes", lambda device, free=bytes_of_ranks: free[dist.get_rank()])
            patch.setattr(planning_module, "largest_sequence_bytes", lambda *args: 1000)
            results[name] = []
            for _ in range(2):
                try:
                    results[name].append(answering(requests))
                except MemoryError as e:
                    results[name].append(str(e))
        assert agree(True, CPU)
    return results | {"warnings": records}


def test_where_no_copy_fits_the_sharded_model_answers_and_says_so_once(directory, tmp_path):
    first, second = run_distributed(with_little_memory, 2, tmp_path, directory)
    assert first["sharded"] == first["copy"]
    assert all(text.startswith("a round needs 0.0 GiB on each device that answers") for text in first["nothing"])
    assert second == {"copy": [None] * 2, "sharded": [None] * 2, "nothing": [None] * 2, "warnings": []}
    (warning,) = first["warnings"]
    assert warning.startswith("no device has room for a copy of the model: the answers come through the sharded model")


def exchanges() -> list[Any]:
    rank = dist.get_rank()
    value = {"text": "ü\x1b\ud800", "numbers": [1, 2.5, None] * 100} if rank == 1 else None
    return [
        broadcast(value, rank == 1, CPU),
        broadcast(None, rank == 0, CPU),
        gather_values(["x" * (rank * 1000)], CPU),
        smallest([2.0, 0.5][rank], CPU),
        largest([2.0, 0.5][rank], CPU),
    ]


def test_values_arrive_whole_whatever_their_size(tmp_path):
    first, second = run_distributed(exchanges, 2, tmp_path)
    assert first == second
    value = {"text": "ü\x1b\ud800", "numbers": [1, 2.5, None] * 100}
    assert first == [value, None, [[""], ["x" * 1000]], 0.5, 2.0]
    assert broadcast((1, 2), True, CPU) == [1, 2]  # without a process group too
