"""Answers are read by the trainer's own model: right ones pass, wrong ones are made again another way, or withheld."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import assets
import pytest
import torch
import torch.distributed as dist
from distributed.test_gather import wrap
from distributed.test_generation import REQUESTS as ALL_REQUESTS
from distributed.test_rounds import Rows, SmallHost, warnings_of_rounds
from distributed.testing import run_distributed
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from transformers import AutoModelForCausalLM

from verl_valgen.backends.fast import loop
from verl_valgen.backends.hf import HFBackend, finish
from verl_valgen.collectives import agree
from verl_valgen.records import WITHHELD, Request
from verl_valgen.rounds import reading as reading_module
from verl_valgen.rounds.proven import ProvenAnswerer
from verl_valgen.rounds.rounds import ValidationRounds
from verl_valgen.settings.load import GenerationSettings
from verl_valgen.weights.plain_copy import PlainCopy

CPU = torch.device("cpu")
REQUESTS = ALL_REQUESTS[:5]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("proven")
    assets.write_model(path / "model", hidden_size=32, intermediate_size=64)
    return path


# Faults


def wrong_tokens(self: HFBackend, *args: Any, original: Callable[..., Any] = HFBackend.generate_batch) -> Any:
    """As if padding were not hidden: right only where a prompt is alone."""
    completions = original(self, *args)
    if len(completions) == 1:
        return completions
    return [replace(c, output_ids=[(token + 11) % 80 for token in c.output_ids]) for c in completions]


def wrong_weights(self: PlainCopy, original: Callable[..., Any] = PlainCopy.finish) -> Any:
    """As if a parameter had not arrived."""
    model = original(self)
    for parameter in model.model.layers[0].self_attn.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    return model


@contextmanager
def planted(*faults: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if "tokens" in faults:
            patch.setattr(HFBackend, "generate_batch", wrong_tokens)
        if "tokens of one" in faults:  # through the sharded model, too
            patch.setattr(HFBackend, "generate_batch", lambda self, *args: wrong_tokens_of_any(self, *args))
        if "rows" in faults:
            patch.setattr(loop, "finish", wrong_tokens_of_rows)
        if "weights" in faults:
            patch.setattr(PlainCopy, "finish", wrong_weights)
        if "reader" in faults and dist.get_rank() == 1:
            patch.setattr(reading_module, "objection", fail)
        yield


def wrong_tokens_of_any(self: HFBackend, *args: Any, original: Callable[..., Any] = HFBackend.generate_batch) -> Any:
    return [replace(c, output_ids=[(t + 11) % 80 for t in c.output_ids]) for c in original(self, *args)]


def wrong_tokens_of_rows(output_ids: list[int], *args: Any) -> Any:
    """As if a row saw what another one had left there."""
    return finish([(token + 11) % 80 for token in output_ids], *args)


def fail(*args: Any) -> None:
    raise RuntimeError("planted in the reading")


# What the trainer's model says of right answers

PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "greedy": {"do_sample": False},
    "hot": {"temperature": 1.5, "top_k": 0, "top_p": 1.0},
    "likeliest of three": {"best_of": 3, "extra": {"min_p": 0.02}},
    "processors": {"extra": {"repetition_penalty": 1.3, "min_new_tokens": 6, "no_repeat_ngram_size": 2}},
    "beams": {"do_sample": False, "extra": {"num_beams": 3, "repetition_penalty": 1.2}},
    "sharded": {"gather": "sharded"},
    "hf": {"backend": "hf"},
}


def small_host(directory: Path, strategy: str = "fsdp2", lora: bool = False) -> SmallHost:
    host = SmallHost(directory, directory, Rows())
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    host.model = wrap(model, strategy)
    return host


def ask(answerer: ProvenAnswerer, requests: list[Request] = REQUESTS) -> Any:
    params = answerer.settings.parameters
    asked = [replace(one, params=params, wants_logprob=answerer.settings.best_of > 1) for one in requests]
    return answerer(asked if answerer.host.is_logging_rank else None)


def of_right_answers(directory: Path, strategy: str, lora: bool) -> dict[str, Any]:
    host = small_host(directory, strategy, lora)
    modes = [module.training for module in host.model.modules()]
    results = {}
    for name, chosen in PARAMETERS.items():
        answers = ask(ProvenAnswerer(host, GenerationSettings(enabled=True, max_new_tokens=12, **chosen)))
        results[name] = answers and answers.verified
    alone = ask(ProvenAnswerer(host, GenerationSettings(enabled=True)), REQUESTS[:1])
    nothing = ask(ProvenAnswerer(host, GenerationSettings(enabled=True)), [])
    assert [module.training for module in host.model.modules()] == modes
    return results | {"alone": alone and alone.verified, "nothing": nothing and nothing.verified}


@pytest.mark.parametrize(("strategy", "lora"), [("fsdp", False), ("fsdp2", False), ("fsdp2", True)])
def test_right_answers_pass(directory, tmp_path, strategy, lora):
    first, second = run_distributed(of_right_answers, 2, tmp_path, directory, strategy, lora)
    assert first == dict.fromkeys([*PARAMETERS, "alone"], True) | {"nothing": None}
    assert set(second.values()) == {None}


# What follows for wrong ones


def of_wrong_answers(directory: Path) -> dict[str, Any]:
    host = small_host(directory)
    results: dict[str, Any] = {}
    for name, faults, chosen in (
        ("padding", ["tokens"], {}),
        ("rows", ["rows"], {"backend": "fast"}),
        ("weights", ["weights"], {}),
        ("everything", ["tokens of one"], {}),
        ("first", [], {"verify": "first"}),
        ("off", ["weights"], {"verify": False}),
        ("reader", ["reader"], {}),
        ("reader of wrong answers", ["reader", "tokens of one"], {"gather": "copy"}),
    ):
        chosen = {"backend": "hf"} | chosen
        answerer = ProvenAnswerer(host, GenerationSettings(enabled=True, max_new_tokens=8, **chosen))
        ways: list[str] = []
        begin = answerer.answerer.begin
        answerer.answerer.begin = lambda requests, way, *args, ways=ways, begin=begin: (  # type: ignore[method-assign]
            ways.append(way.name),
            begin(requests, way, *args),
        )[1]
        with planted(*faults), warnings_of_rounds() as records, counted_reads() as reads:
            rounds = [ask(answerer) for _ in range(2)]
        verdicts = [answers and answers.verified for answers in rounds]
        results[name] = {"verified": verdicts, "ways": ways, "warnings": records, "reads": len(reads)}
        assert agree(True, CPU)
    return results


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    reads: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        read = SmallHost.read
        patch.setattr(SmallHost, "read", lambda *args: (reads.append(1), read(*args))[1])
        yield reads


@pytest.fixture(scope="module")
def outcomes(directory, tmp_path_factory) -> list[dict[str, Any]]:
    return run_distributed(of_wrong_answers, 2, tmp_path_factory.mktemp("wrong"), directory)


def test_answers_are_made_again_on_the_next_way_which_stays(outcomes):
    first, second = (outcome["padding"] for outcome in outcomes)
    alone = "hf, one prompt at a time"
    assert first["verified"] == [True, True]
    assert first["ways"] == second["ways"] == ["hf", alone, alone]
    assert first["reads"] == second["reads"] == 3
    (warning,) = first["warnings"]
    assert warning.startswith("the answers of LlamaForCausalLM (hf) failed the check: 8 of 8 tokens lie below")
    assert warning.endswith(f"the answers were made again, and will be from now on: {alone}")
    assert second["warnings"] == []


def test_answers_of_refilled_rows_are_made_again_in_batches(outcomes):
    first, second = (outcome["rows"] for outcome in outcomes)
    assert first["verified"] == [True, True]
    assert first["ways"] == second["ways"] == ["fast", "hf", "hf"]


def test_where_the_copy_is_wrong_the_sharded_model_answers(outcomes):
    first, second = (outcome["weights"] for outcome in outcomes)
    sharded = "the sharded model, one prompt at a time"
    assert first["verified"] == [True, True]
    assert first["ways"] == second["ways"] == ["hf", "hf, one prompt at a time", sharded, sharded]
    assert len(first["warnings"]) == 1
    assert sharded in first["warnings"][0]


def test_where_no_way_passes_the_answers_are_unverified(outcomes):
    first, second = (outcome["everything"] for outcome in outcomes)
    assert first["verified"] == [False, False]
    assert first["ways"] == second["ways"]
    assert len(first["ways"]) == 3 + 1, "the second round tries no other way again"
    (warning,) = first["warnings"]
    assert warning.endswith("no safer way does better, so the answers are in the JSONL files alone, without scores")


def test_the_check_can_be_had_once_or_not_at_all(outcomes):
    for outcome in outcomes:
        assert outcome["first"]["reads"] == 1
        assert outcome["off"]["reads"] == 0
    assert outcomes[0]["first"]["verified"] == [True, None]
    assert outcomes[0]["off"]["verified"] == [None, None]
    assert outcomes[0]["off"]["warnings"] == []


def test_where_the_reading_fails_the_answers_stand_unchecked(outcomes):
    assert outcomes[0]["reader"]["verified"] == [None, None]
    assert outcomes[0]["reader"]["warnings"] == outcomes[1]["reader"]["warnings"] == []


def test_an_objection_stands_where_another_rank_could_not_read(outcomes):
    assert outcomes[0]["reader of wrong answers"]["verified"] == [False, False]


def with_guidance_of_one(directory: Path) -> Any:
    """Its logits processor runs the model for every token: no two ranks would do the same."""
    host = small_host(directory)
    answerer = ProvenAnswerer(host, GenerationSettings(enabled=True, max_new_tokens=6, gather="copy"))
    params = answerer.settings.parameters
    asked = [replace(one, params=params | ({"guidance_scale": 1.5} if one.key[0] == 4 else {})) for one in REQUESTS]
    only = answerer(asked[4:] if host.is_logging_rank else None)
    all_of_them = answerer(asked if host.is_logging_rank else None)
    assert agree(True, CPU)
    return [answers and answers.verified for answers in (only, all_of_them)]


def test_answers_under_guidance_are_not_read(directory, tmp_path):
    assert run_distributed(with_guidance_of_one, 2, tmp_path, directory)[0] == [None, True]


def with_ways_that_fail_to_run(directory: Path) -> Any:
    """At first no safer way can be taken; in the next round it can."""
    host = small_host(directory)
    answerer = ProvenAnswerer(host, GenerationSettings(enabled=True, max_new_tokens=8, backend="hf"))
    verified, texts = [], []
    made_again = answerer._made_again
    for run in (fail, made_again):
        answerer._made_again = run  # type: ignore[method-assign]
        with planted("tokens"):
            answers = ask(answerer)
        verified.append(answers and answers.verified)
        texts.append(answers and [bool(completion.output_ids) for completion in answers.completions])
    return verified, texts


def test_a_way_that_could_not_be_taken_is_tried_again(directory, tmp_path):
    verified, texts = run_distributed(with_ways_that_fail_to_run, 2, tmp_path, directory)[0]
    assert verified == [False, True]
    assert texts == [[True] * 5] * 2, "the answers that failed are kept for the record"


def fsdp1_memory_after_reading(directory: Path) -> list[int]:
    host = small_host(directory, "fsdp")
    sizes = [whole_bytes(host.model)]
    host.read([[5, 6, 7, 8]], [2])
    return [*sizes, whole_bytes(host.model)]


def whole_bytes(model: FSDP) -> int:
    handles = [unit._handle for unit in FSDP.fsdp_modules(model) if unit._handle is not None]
    paddeds = [getattr(handle.flat_param, "_full_param_padded", None) for handle in handles]
    return sum(padded.untyped_storage().size() for padded in paddeds if padded is not None)


def test_nothing_stays_whole_after_a_reading_under_fsdp1(directory, tmp_path):
    assert run_distributed(fsdp1_memory_after_reading, 2, tmp_path, directory) == [[0, 0]] * 2


# Where they are shown


def with_answers_withheld(directory: Path, here: Path) -> dict[str, Any]:
    host = small_host(directory)
    host.config.trainer.default_local_dir = str(here)
    settings = GenerationSettings(
        enabled=True, max_new_tokens=6, max_val_samples=3, metrics=["exact_match"], best_metric="exact_match",
        backend="hf",
    )  # fmt: skip
    shown = io.StringIO()
    with planted("tokens of one"), contextlib.redirect_stdout(shown), ValidationRounds(host, settings):
        host.rounds(1)
    rounds = ValidationRounds(host, settings)
    with planted("tokens of one"):
        try:
            samples = rounds.generate_samples({"input_ids": torch.arange(5, 25).reshape(2, 10)})
        except RuntimeError as e:
            return {"raised": str(e), "shown": shown.getvalue()}
    return {"samples": samples}


def test_unverified_answers_are_in_the_jsonl_files_alone(directory, tmp_path):
    first, second = run_distributed(with_answers_withheld, 2, tmp_path, directory, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "generations/step_00000001.jsonl").read_text().splitlines()]
    assert [record["verified"] for record in records] == [False] * 3
    assert all(record["generation"] and record["scores"] == {} for record in records)
    assert not (tmp_path / "generations/best.json").exists()
    shown = first.pop("shown")
    generations = [line for line in shown.splitlines() if line.startswith("Generation")]
    assert generations == [f"Generation {number}: {WITHHELD}" for number in (1, 2, 3)]
    assert first == {"raised": "the answers failed the check against the trainer's model"}
    assert second == {"samples": ([], [])}
