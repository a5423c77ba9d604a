"""Rounds on two ranks: whatever fails on one, both go on, and the trainer sees nothing of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import assets
import pytest
import torch
import torch.distributed as dist
from distributed.test_gather import wrap
from distributed.testing import run_distributed
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_valgen.backends.hf import HFBackend
from verl_valgen.collectives import agree
from verl_valgen.hosts.base import Host
from verl_valgen.hosts.schedule import Schedule
from verl_valgen.prompts.files import read_own_prompts
from verl_valgen.rounds import recorder as recorder_module
from verl_valgen.rounds.rounds import ValidationRounds
from verl_valgen.settings.load import ConfigError, GenerationSettings
from verl_valgen.trackers import composite as composite_module
from verl_valgen.trackers.jsonl import JsonlTracker
from verl_valgen.weights.plain_copy import PlainCopy

CPU = torch.device("cpu")


class SmallHost(Host):
    """A sharded model and four rows, without a trainer around them."""

    trainer_name = "SmallTrainer"

    def __init__(self, model_directory: Path, directory: Path, val_dataset: Any) -> None:
        super().__init__(trainer=None)
        self.config = OmegaConf.create({"trainer": {"default_local_dir": str(directory), "logger": ["console"]}})
        self.model = wrap(AutoModelForCausalLM.from_pretrained(model_directory / "model"), "fsdp2")
        self.tokenizer = AutoTokenizer.from_pretrained(model_directory / "model")
        self.val_dataset = val_dataset
        self.device, self.compute_dtype = CPU, torch.bfloat16
        self.is_logging_rank = dist.get_rank() == 0
        self.rounds: Callable[[int], None] = lambda step: None

    def schedule(self) -> Schedule:
        return Schedule(0, 4, 4, 1)

    def validation_rows(self, limit: int) -> list[int]:
        return list(range(min(limit, 4)))

    def why_no_validation_batch(self) -> str | None:
        return None

    @contextmanager
    def hooked(
        self, hook: Callable[[int], None], *, before_train: bool, at_batch: Callable[[], None] | None = None
    ) -> Iterator[None]:
        self.rounds = hook
        self.at_batch = at_batch or (lambda: None)
        yield

    has_accelerator = launch_support = None  # type: ignore[assignment]


class Rows:
    """Items with the exact loss mask, as a data set of one's own may give them."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if self.broken:
            raise OSError("a broken row \x1b[31m")
        torch.rand(3)  # draws: the random state must be put back
        return {"input_ids": torch.arange(5, 15 + row), "loss_mask": (torch.arange(10 + row) >= 6).long()}


def fail(kind: str, patch: pytest.MonkeyPatch) -> None:
    def planted(*args: Any, **kwargs: Any) -> Any:
        raise (torch.OutOfMemoryError if kind == "oom" else RuntimeError)(f"planted in {kind}")

    targets = {
        "prepare": (PlainCopy, "__init__"),
        "oom": (PlainCopy, "receive"),
        "finish": (PlainCopy, "finish"),
        "decode": (HFBackend, "generate"),
        "trackers": (recorder_module, "open_trackers"),
        "jsonl": (JsonlTracker, "log"),
    }
    if kind in targets:
        patch.setattr(*targets[kind], planted)


@contextmanager
def warnings_of_rounds() -> Iterator[list[str]]:
    """The warnings, without those of a slow tracker: on a busy machine any tracker is slow."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("verl_valgen")
    logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composite_module, "_MAX_WAIT_S", 60.0)
        yield records
    logger.removeHandler(handler)


def three_rounds(model_directory: Path, directory: Path, kind: str) -> dict[str, Any]:
    """Three rounds with a fault on rank 0; afterwards both ranks must still meet."""
    host = SmallHost(model_directory, directory, Rows(broken=kind == "rows" and dist.get_rank() == 0))
    settings = GenerationSettings(enabled=True, max_new_tokens=4, max_val_samples=3)
    state = torch.get_rng_state()
    with warnings_of_rounds() as records, pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            fail(kind, patch)
        rounds = ValidationRounds(host, settings)
        with rounds, rounds.told_if_missing():
            for step in (1, 2, 3):
                host.rounds(step)
            warnings = list(records)
    return {
        "warnings": warnings,
        "missing": records[len(warnings) :],
        "met": agree(True, CPU),
        "random": torch.equal(state, torch.get_rng_state()),
        "files": sorted(path.name for path in (directory / "generations").glob("step_*.jsonl")),
    }


FAULTS = {
    "rows": "the prompts could not be prepared, so there will be no samples: OSError: a broken row \\x1b[31m",
    "prepare": "no samples at this validation: RuntimeError: planted in prepare",
    "oom": "no samples at this validation: torch.OutOfMemoryError: planted in oom",
    "finish": "no samples at this validation: RuntimeError: planted in finish",
    "decode": "no samples at this validation: RuntimeError: planted in decode",
    "trackers": "no samples at this validation: RuntimeError: planted in trackers",
    "jsonl": "jsonl: a round was not recorded: RuntimeError: planted in jsonl",
}


def wrong_configuration(model_directory: Path, directory: Path) -> dict[str, Any]:
    """A mistake that rank 0 finds, which alone reads the rows; afterwards both ranks must still meet."""
    host = SmallHost(model_directory, directory, Rows())
    settings = GenerationSettings(enabled=True, rows={"per_source": 2})
    with pytest.raises(ConfigError) as caught, ValidationRounds(host, settings):
        raise AssertionError("training begins")
    return {"error": str(caught.value), "met": agree(True, CPU)}


def all_faults(directory: Path) -> dict[str, dict[str, Any]]:
    outcomes = {kind: three_rounds(directory, directory / kind, kind) for kind in ("none", *FAULTS)}
    return outcomes | {"configuration": wrong_configuration(directory, directory / "configuration")}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rounds")
    assets.write_model(path / "model", hidden_size=32, intermediate_size=64)
    return path


@pytest.fixture(scope="module")
def outcomes(directory) -> list[dict[str, dict[str, Any]]]:
    return run_distributed(all_faults, 2, directory, directory)


@pytest.mark.parametrize(("kind", "warning"), FAULTS.items())
def test_a_fault_on_rank_0_costs_one_warning(outcomes, kind, warning):
    first, second = (outcome[kind] for outcome in outcomes)
    assert [text.partition(";")[0] for text in first["warnings"]] == [warning]
    assert second["warnings"] == []
    for result in (first, second):
        assert result["met"]
        assert result["random"]
        assert result["files"] == []
    if kind == "oom":
        assert "lower generation.max_new_tokens, or set generation.gather=sharded" in first["warnings"][0]


def test_a_mistake_that_only_the_data_shows_ends_the_run_on_all_ranks(outcomes):
    results = [outcome["configuration"] for outcome in outcomes]
    error = "generation.rows: per_source needs a column data_source, which the validation data does not have"
    assert results == [{"error": error, "met": True}] * 2


def test_rounds_that_were_announced_and_did_not_come_are_told_once(outcomes):
    first, second = (outcome["none"]["missing"] for outcome in outcomes)
    assert first == [
        "no samples came at these steps, for which they were announced: 4; training ended without validating there "
        "(last step with samples: 3)"
    ]
    assert second == []
    assert outcomes[0]["rows"]["missing"] == []  # none were announced


def test_without_a_fault_every_round_is_written(outcomes, directory):
    first, second = (outcome["none"] for outcome in outcomes)
    assert first["warnings"] == second["warnings"] == []
    assert first["random"]
    assert second["random"]
    assert first["files"] == [f"step_{step:08d}.jsonl" for step in (1, 2, 3)]
    rounds = [(directory / "none" / "generations" / name).read_text().splitlines() for name in first["files"]]
    texts = [[json.loads(line)["generation"] for line in lines] for lines in rounds]
    assert len(texts[0]) == 3
    assert texts[0] == texts[1] == texts[2]  # the weights are the same, so is what they say


def samples_of_uneven_batches(directory: Path) -> tuple[list[str], list[str]]:
    """Rank 0 passes two rows, rank 1 an empty batch."""
    host = SmallHost(directory, directory, Rows())
    num_rows = 2 if dist.get_rank() == 0 else 0
    batch = {"input_ids": torch.arange(5, 15).repeat(num_rows, 1), "attention_mask": torch.ones(num_rows, 10).long()}
    return ValidationRounds(host, GenerationSettings(enabled=False, max_new_tokens=4)).generate_samples(batch)


def test_generate_samples_on_uneven_batches(directory):
    first, second = run_distributed(samples_of_uneven_batches, 2, directory, directory)
    assert second == ([], [])
    prompts, generations = first
    assert len(prompts) == len(generations) == 2
    assert prompts[0] == prompts[1]


WAITS_FOR_RANK_1 = """
import os, time

def waits(sample):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if os.path.exists("{done}"):
            return 1.0
        time.sleep(0.01)
    return 0.0
"""


def with_a_slow_metric(directory: Path) -> list[float]:
    """The metric waits until rank 1 has left the round."""
    done = directory / "rank 1 is done"
    (directory / "slow.py").write_text(WAITS_FOR_RANK_1.format(done=done))
    host = SmallHost(directory, directory / "slow", Rows())
    settings = GenerationSettings(
        enabled=True, max_new_tokens=4, max_val_samples=1, metrics=[f"{directory}/slow.py:waits"], max_round_time_s=300
    )
    with ValidationRounds(host, settings):
        host.rounds(1)
        if dist.get_rank() == 1:
            done.touch()
        agree(True, CPU)
    if dist.get_rank() == 1:
        return []
    path = directory / "slow" / "generations" / "step_00000001.jsonl"
    return [json.loads(line)["scores"]["waits"] for line in path.read_text().splitlines()]


def test_metrics_do_not_hold_the_other_ranks(directory):
    assert run_distributed(with_a_slow_metric, 2, directory, directory) == [[1.0], []]


def with_a_prompt_that_fails(directory: Path, gather: str) -> dict[str, Any]:
    """transformers refuses its parameters only while it generates. It asks for fewer completions than the others."""
    prompts = [{"prompt": text} for text in ("one", "two", "three")]
    prompts[1]["generation_params"] = {"exponential_decay_length_penalty": [1], "do_sample": False}  # type: ignore[assignment]
    (directory / "own.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    host = SmallHost(directory, directory / gather, Rows())
    settings = GenerationSettings(
        enabled=True, n=2, max_new_tokens=4, prompts=str(directory / "own.jsonl"), ranks=2, gather=gather
    )
    file_prompts = read_own_prompts(settings.prompts, settings.params_key)
    with warnings_of_rounds() as records, ValidationRounds(host, settings, file_prompts):
        for step in (1, 2):
            host.rounds(step)
    files = sorted((directory / gather / "generations").glob("step_*.jsonl")) if dist.get_rank() == 0 else []
    rounds = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    texts = [[(sample["prompt_text"], sample["generation"]) for sample in samples] for samples in rounds]
    return {"warnings": records, "met": agree(True, CPU), "texts": texts}


@pytest.mark.parametrize("gather", ["copy", "sharded"])
def test_a_prompt_whose_parameters_fail_costs_itself_and_only_once(directory, gather):
    first, second = run_distributed(with_a_prompt_that_fails, 2, directory, directory, gather)
    failing, whole = first["texts"]
    assert [prompt for prompt, _ in whole] == ["one", "one", "two", "two", "three", "three"]
    assert failing == [(prompt, generation) for prompt, generation in whole if prompt != "two"]
    (warning,) = first["warnings"]
    assert warning.startswith("no answer to own.jsonl line 2: ")
    assert "IndexError" in warning
    assert second["warnings"] == []
    assert first["met"]
    assert second["met"]
