"""Training is bit for bit the same, whether something is generated or not.

Runs with generation off, greedy and sampling, seeded alike, with rounds before training and at every second step. All
that a run leaves is compared: what it logs, parameters, optimizer, data loader and random states; also after it was
stopped at a checkpoint and went on from there.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from end_to_end.server import TrainerServer
from end_to_end.trainer import HAS_ENGINES, Assets, Run, strategy
from reliability.conftest import IS_WHOLE

# torch's default seed differs from process to process, and verl 0.6.1 seeds nothing. On GPUs two runs may differ of
# themselves unless they are told not to.
SEED_AND_REPORT = """
import atexit, os, random
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
import numpy, torch
torch.use_deterministic_algorithms(True, warn_only=True)
random.seed(0), numpy.random.seed(0), torch.manual_seed(0)

def report():
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    states["cuda"] = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    torch.save(states, f"random_states_{os.environ.get('RANK', 0)}.pt")

atexit.register(report)
"""
STEPS, STOPPED_AT = 4, 2
GENERATION = ["+generation.before_train=true", "+generation.max_new_tokens=6"]
WAYS = {
    "greedy": ["+generation.do_sample=false"],
    "sampling": ["+generation.n=2"],
    "sharded": ["+generation.n=2", "+generation.gather=sharded"],
}
"""The first two with a copy, the last through the modules that are trained."""

ALL = list(itertools.product(("fsdp", "fsdp2"), (1, 2), (False, True)))
CASES = [case for case in ALL if IS_WHOLE or sum((case[0] == "fsdp", case[1] == 1, case[2])) % 2 == 0]
"""Of three things with two values each, half of all cases have every pair."""


@dataclass(frozen=True)
class Training:
    """What all runs of a case have in common."""

    server: TrainerServer
    assets: Assets
    fsdp: str
    num_ranks: int
    lora: bool
    ways: Sequence[str]
    overrides: Sequence[str] = ()
    before: str = ""


def train(training: Training, directory: Path, generation: Sequence[str]) -> Run:
    result = training.server.run(
        directory,
        [
            *training.assets.overrides(multiturn=True), strategy(training.fsdp), *training.overrides, *generation,
            *(["model.lora_rank=4"] if training.lora else []), f"trainer.total_training_steps={STEPS}",
            "trainer.test_freq=2", f"trainer.save_freq={STOPPED_AT}", "trainer.resume_mode=auto",
        ],
        num_ranks=training.num_ranks,
        before=SEED_AND_REPORT + training.before,
    )  # fmt: skip
    assert result.returncode == 0, result.output[-5000:]
    return result


def resumed(training: Training, first: Run, generation: Sequence[str]) -> Run:
    """The run again, as if it had been stopped at its first checkpoint."""
    directory = first.directory.with_name(f"{first.directory.name}-resumed")
    step = f"global_step_{STOPPED_AT}"
    shutil.copytree(first.checkpoints / step, directory / "checkpoints" / step)
    (directory / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(STOPPED_AT))
    return train(training, directory, generation)


def name_of(case: Any) -> str:
    return f"{case[0]}-{case[1]}-{'lora' if case[2] else 'full'}"


def ways_of(case: Any) -> list[str]:
    """All, or two, so that the cases have every pair of a way and what else there is."""
    _, num_ranks, lora = case
    if IS_WHOLE:
        return list(WAYS)
    return ["greedy", "sampling"] if num_ranks == 1 else ["sharded", "greedy" if lora else "sampling"]


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def runs(request, server, tmp_path_factory, assets) -> Iterator[dict[str, tuple[Run, Run]]]:
    training = Training(server, assets, *request.param, ways_of(request.param))
    yield from runs_of(training, tmp_path_factory.mktemp("same"))


def runs_of(training: Training, directory: Path) -> Iterator[dict[str, tuple[Run, Run]]]:
    """By way ("off" among them) the whole run, and its second half after a stop."""
    found = {}
    for way in ("off", *training.ways):
        generation = [] if way == "off" else [*GENERATION, *WAYS[way]]
        whole = train(training, directory / way, generation)
        found[way] = (whole, resumed(training, whole, generation))
    yield found
    shutil.rmtree(directory)


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Where two values differ, to the bit."""
    if type(one) is not type(other):
        yield f"{where}: {type(one)} and {type(other)}"
    elif hasattr(one, "_local_tensor"):
        yield from differences(one._local_tensor, other._local_tensor, where)
    elif isinstance(one, torch.Tensor | np.ndarray):
        one, other = (torch.as_tensor(value).detach().contiguous() for value in (one, other))
        is_alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        if not is_alike or not torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)):
            yield where
    elif isinstance(one, dict):
        if one.keys() != other.keys():
            yield f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"
        for key in one.keys() & other.keys():
            yield from differences(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{where}: {len(one)} and {len(other)} items"
        for i, pair in enumerate(zip(one, other, strict=False)):
            yield from differences(*pair, f"{where}/{i}")
    elif hasattr(one, "__dict__"):
        yield from differences(vars(one), vars(other), where)
    elif one != other:
        yield f"{where}: {one!r} and {other!r}"


def saved(result: Run) -> dict[str, Any]:
    """All that the run saved, by file."""
    return at_step(result, STEPS) | loaded(result.directory.glob("random_states_*.pt"))


def at_step(result: Run, step: int) -> dict[str, Any]:
    return loaded((result.checkpoints / f"global_step_{step}").glob("**/*.pt"))


def loaded(paths: Iterable[Path]) -> dict[str, Any]:
    return {path.name: torch.load(path, map_location="cpu", weights_only=False) for path in paths}


@pytest.mark.parametrize("half", [0, 1], ids=["whole", "resumed"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_that_a_run_leaves_differs(runs, way, half):
    if way not in runs:
        pytest.skip("a part of the ways is tried")
    on, off = runs[way][half], runs["off"][half]
    assert on.warnings == []
    assert [path.name for path in sorted(on.generations.glob("step_*"))] == [
        f"step_{step:08d}.jsonl" for step in ((0, 2, 4) if half == 0 else (2, 4))
    ]
    assert not off.generations.exists()
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        expected = (STEPS if key.startswith("train") else STEPS // 2) // (1 + half)
        if key != "train/grad_norm" or HAS_ENGINES:
            assert len(on.logged(key)) == expected
        assert on.logged(key) == off.logged(key)
    files = saved(on)
    kinds = Counter(name.partition("_")[0].partition(".")[0] for name in files)
    by_rank = dict.fromkeys(("model", "optim", "extra", "random"), kinds["random"])
    assert kinds == by_rank | {"data": kinds["data"]}
    assert kinds["data"] > 0
    assert all((files[name]["cuda"] is None) != torch.cuda.is_available() for name in files if "random" in name)
    assert list(differences(files, saved(off))) == []


def test_what_is_compared_differs_between_steps(runs):
    """Else nothing has been shown."""
    whole, _ = runs["off"]
    before, after = at_step(whole, STOPPED_AT), at_step(whole, STEPS)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert list(differences(value, after[name])), name
