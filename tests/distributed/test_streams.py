"""Every rank takes part in the whole stream of weights, whatever its consumer does, and the stream is the model's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.test_gather import MODELS, build, forward, wrap
from distributed.testing import run_distributed
from torch import Tensor

from verl_valgen.collectives import agree
from verl_valgen.weights.checkpoint import Checkpoint
from verl_valgen.weights.checkpoint_stream import stream
from verl_valgen.weights.merged import MergedWeights

CPU = torch.device("cpu")


def taken(pairs: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pairs}


def stop_early(pairs: Iterator[tuple[str, Tensor]]) -> str:
    for name, _ in pairs:
        if "layers.0" in name:
            return "stopped"
    return "never"


def fail_in_the_middle(pairs: Iterator[tuple[str, Tensor]]) -> str:
    for name, _ in pairs:
        if "layers.1" in name:
            raise torch.OutOfMemoryError("planted")
    return "never"


def meet_afterwards(pairs: Iterator[tuple[str, Tensor]]) -> str:
    """As ranks do that hold a model together: none waits for one that is still gathering."""
    try:
        return f"{len(taken(pairs)) > 9}"
    finally:
        agree(True, CPU)


def fail_to_convert(_: Checkpoint, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if "layers.1" in name:
        raise torch.OutOfMemoryError("planted")
    yield name, tensor


def fail_to_prepare(*args: Any, **kwargs: Any) -> None:
    raise MemoryError("planted")


def outcome(model: Any, consume: Any, keep: bool = True) -> tuple[Any, bool]:
    """What came of a stream, and whether the ranks met after it."""
    try:
        result: Any = stream(model, consume, dtype=torch.bfloat16, device=CPU, keep=keep)
    except Exception as e:
        result = f"{type(e).__name__}: {e}"
    return result, agree(True, CPU)


def streams(name: str, strategy: str) -> dict[str, Any]:
    wrapped, control = wrap(build(name), strategy), wrap(build(name), strategy)
    is_first = dist.get_rank() == 0
    found: dict[str, Any] = {"before the first forward": outcome(wrapped, taken)}
    found["one fails, one stops"] = outcome(wrapped, fail_in_the_middle if is_first else stop_early)
    found["one fails, one keeps nothing"] = outcome(wrapped, fail_in_the_middle, keep=is_first)
    found["one takes, one stops"] = outcome(wrapped, taken if is_first else stop_early)
    with pytest.MonkeyPatch.context() as patch:
        if is_first:
            patch.setattr(MergedWeights, "__init__", fail_to_prepare)
        found["one cannot prepare"] = outcome(wrapped, taken)
    with pytest.MonkeyPatch.context() as patch:
        if is_first:
            patch.setattr(Checkpoint, "convert", fail_to_convert)
        found["one cannot convert"] = outcome(wrapped, meet_afterwards)
    found["forward"] = torch.equal(forward(wrapped, train=True), forward(control, train=True))
    found["after a training step"] = outcome(wrapped, taken, keep=not is_first)
    found["expected"] = stream(build(name), taken, dtype=torch.bfloat16, device=CPU, keep=True)
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("tied", "fsdp"), ("lora", "fsdp"), ("lora-tied", "fsdp2"), ("rslora-with-trained-head", "fsdp2")],
)
def test_a_stream_is_taken_whole_whatever_becomes_of_a_consumer(tmp_path: Path, name: str, strategy: str):
    first, second = run_distributed(streams, 2, tmp_path, name, strategy)
    expected = first["expected"]
    assert ("lm_head.weight" in expected) != MODELS[name][1].tie_word_embeddings
    for rank, found in enumerate((first, second)):
        weights, met = found["before the first forward"]
        assert met
        assert same(weights, expected), rank
        assert found["forward"], f"rank {rank}: training differs after streams"
    planted, stopped, nothing = ("OutOfMemoryError: planted", True), ("stopped", True), (None, True)
    assert (first["one fails, one stops"], second["one fails, one stops"]) == (planted, stopped)
    assert (first["one fails, one keeps nothing"], second["one fails, one keeps nothing"]) == (planted, nothing)
    assert same(first["one takes, one stops"][0], expected)
    assert second["one takes, one stops"] == stopped
    assert (first["one cannot prepare"], second["one cannot prepare"]) == (("MemoryError: planted", True), nothing)
    assert (first["one cannot convert"], second["one cannot convert"]) == (planted, ("True", True))
    assert first["after a training step"] == nothing
    assert same(second["after a training step"][0], expected)
