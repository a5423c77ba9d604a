"""When an engine is kept, made anew and given up. The engine is a fake: it fails when it is told to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import LlamaConfig

from verl_valgen.backends import Way
from verl_valgen.backends.base import Work
from verl_valgen.backends.vllm import engine as engine_module
from verl_valgen.backends.vllm.loader import EngineLoader
from verl_valgen.backends.vllm.making import EngineSize
from verl_valgen.records import Request
from verl_valgen.rounds import generation
from verl_valgen.rounds.generation import Answerer


class FakeEngine:
    made: ClassVar[list[FakeEngine]] = []
    failing: ClassVar[set[str]] = set()

    def __init__(self, config: Any, model_class: Any, size: EngineSize, *args: Any, **kwargs: Any) -> None:
        if "make" in self.failing:
            raise RuntimeError("planted: it cannot be made")
        self.size, self.has_failed, self.said = size, False, []
        self.made.append(self)

    def serves(self, size: EngineSize) -> bool:
        return not self.has_failed and size.max_model_len <= self.size.max_model_len

    def load(self, weights: Any) -> None:
        self.said.append("load")
        if "load" in self.failing:
            self.has_failed = True
            raise RuntimeError("planted: weights do not arrive")

    def sleep(self) -> None:
        self.said.append("sleep")

    def close(self) -> None:
        self.said.append("close")


@pytest.fixture
def loader(monkeypatch) -> EngineLoader:
    monkeypatch.setattr(engine_module, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "made", [])
    monkeypatch.setattr(FakeEngine, "failing", set())
    return EngineLoader()


SOURCE: Any = SimpleNamespace(
    device=torch.device("cpu"),
    model_config=LlamaConfig(),
    model_class=object,
    stream=lambda consume, dtype, *, keep: consume(iter(())) if keep else None,
)


def work(length: int = 10, has_share: bool = True) -> Work:
    requests = [Request([1] * length, (0, 0), {"max_new_tokens": 5})]
    return Work(requests, requests if has_share else [], torch.float32, batch_size=4)


def one_round(loader: EngineLoader, **kwargs: Any) -> str:
    try:
        loaded = loader.load(SOURCE, work(**kwargs))
    except RuntimeError as e:
        return str(e)
    finally:
        loader.release()
    return "nothing" if loaded is None else "loaded"


def test_one_engine_serves_all_rounds_and_sleeps_in_between(loader):
    assert loader.ranks_per_kept_copy == 0
    assert [one_round(loader) for _ in range(3)] == ["loaded"] * 3
    (engine,) = FakeEngine.made
    assert engine.said == ["load", "sleep"] * 3
    assert loader.ranks_per_kept_copy == 1


def test_a_longer_request_makes_it_anew(loader):
    assert [one_round(loader, length=length) for length in (10, 50, 20)] == ["loaded"] * 3
    first, second = FakeEngine.made
    assert first.said == ["load", "sleep", "close"]
    assert second.size.max_model_len == 55
    assert second.said == ["load", "sleep"] * 2


def test_a_rank_without_a_share_has_an_engine_that_loads_nothing(loader):
    assert one_round(loader, has_share=False) == "nothing"
    assert FakeEngine.made[0].said == ["sleep"]


def test_what_cannot_be_made_is_tried_twice(loader):
    FakeEngine.failing.add("make")
    expected = "no engine could be made: RuntimeError: planted: it cannot be made"
    assert [one_round(loader) for _ in range(2)] == [expected] * 2
    FakeEngine.failing.clear()
    assert one_round(loader) == expected
    assert FakeEngine.made == []


def test_an_engine_that_has_failed_is_freed_at_once_and_made_anew_once(loader):
    FakeEngine.failing.add("load")
    assert one_round(loader) == "planted: weights do not arrive"
    assert FakeEngine.made[0].said == ["load", "sleep", "close"]
    assert loader.ranks_per_kept_copy == 0
    assert one_round(loader) == "planted: weights do not arrive"
    assert [one_round(loader) for _ in range(2)] == ["the engine has failed twice"] * 2
    assert len(FakeEngine.made) == 2
    assert FakeEngine.made[1].said[-1] == "close"


def test_failures_far_apart_do_not_add_up(loader):
    for _ in range(3):
        FakeEngine.failing.add("load")
        assert one_round(loader) == "planted: weights do not arrive"
        FakeEngine.failing.clear()
        assert [one_round(loader) for _ in range(2)] == ["loaded"] * 2


@pytest.mark.parametrize(
    ("name", "is_made", "are_freed"), [("fast", False, True), ("vllm", False, False), ("fast", True, False)]
)
def test_workspaces_that_graphs_write_to_stay(loader, monkeypatch, name, is_made, are_freed):
    """Those of an engine write where cuBLAS's workspace was when they were captured, in later rounds, too."""
    if is_made:
        loader.load(SOURCE, work())
    monkeypatch.setattr(generation, "preserved_blas_workspaces", lambda device: "freed")
    answerer: Any = SimpleNamespace(loaders={"vllm": loader}, host=SimpleNamespace(device=SOURCE.device))
    way = Way(name, name, is_engine=name == "vllm")
    assert (Answerer._own_workspaces(answerer, way) == "freed") == are_freed
