"""What a run of verl's trainer leaves, compared with another's to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from end_to_end.trainer import HAS_ENGINES, Run

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
"""Runs before the trainer's program."""


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


def assert_same_training(
    on: Run, off: Run, *, last_step: int, num_steps: int, num_validations: int, num_drivers: int = 0
) -> None:
    """Logs, parameters, optimizer, data loader and random states are the same in both runs, and there.

    Args:
        last_step: A checkpoint has its number.
        num_steps: Training steps of each of the runs.
        num_drivers: Processes beside the ranks, with random states of their own.
    """
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        expected = num_steps if key.startswith("train") else num_validations
        if key != "train/grad_norm" or HAS_ENGINES:
            assert len(on.logged(key)) == expected
        assert on.logged(key) == off.logged(key)
    files, expected_files = (at_step(run, last_step) | random_states(run) for run in (on, off))
    kinds = Counter(name.partition("_")[0].partition(".")[0] for name in files)
    num_ranks = kinds["random"] - num_drivers
    by_rank = dict.fromkeys(("model", "optim", "extra"), num_ranks)
    assert kinds == by_rank | {"random": kinds["random"], "data": kinds["data"]}
    assert min(num_ranks, kinds["data"]) > 0
    assert all((files[name]["cuda"] is None) != torch.cuda.is_available() for name in files if "random" in name)
    assert list(differences(files, expected_files)) == []


def assert_checkpoints_differ(run: Run, one: int, other: int) -> None:
    """In every file: else that two runs' are the same shows nothing."""
    before, after = at_step(run, one), at_step(run, other)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert list(differences(value, after[name])), name


def at_step(result: Run, step: int) -> dict[str, Any]:
    return loaded((result.checkpoints / f"global_step_{step}").glob("**/*.pt"))


def random_states(result: Run) -> dict[str, Any]:
    """The random states at the run's end, by file."""
    return loaded(result.directory.glob("random_states_*.pt"))


def loaded(paths: Iterable[Path]) -> dict[str, Any]:
    return {path.name: torch.load(path, map_location="cpu", weights_only=False) for path in paths}
