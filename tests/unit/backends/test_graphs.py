"""When steps are captured and which, with a capture that is none: the rest runs as it would on CUDA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from row_cases import GREEDY, MIXED, SAMPLING, answer, model, requests, tokenizer
from transformers import LogitsProcessorList

from verl_valgen.backends.base import Limits, UnsuitableError
from verl_valgen.backends.fast import backend as fast_backend
from verl_valgen.backends.fast import cuda_graph, loop
from verl_valgen.backends.fast.backend import FastBackend
from verl_valgen.backends.fast.choice import Choice
from verl_valgen.backends.fast.cuda_graph import CudaGraph
from verl_valgen.backends.fast.step import Method
from verl_valgen.backends.hf import HFBackend

__all__ = ["model", "tokenizer"]


class Recording:
    """Stands for a graph: it runs the function again."""

    def __init__(self, function: Any) -> None:
        self.replay = function


@pytest.fixture
def captures(monkeypatch) -> list[Any]:
    """Grows with every capture."""
    captured: list[Any] = []

    def capture(self: CudaGraph) -> Any:
        captured.append(self.key)
        self.output = None
        return Recording(self.function)

    monkeypatch.setattr(CudaGraph, "_capture", capture)
    monkeypatch.setattr(cuda_graph, "_captured", set())
    return captured


@pytest.fixture
def on_cuda(monkeypatch, captures) -> list[Any]:
    """A loop that goes on as on CUDA."""
    init = loop.DecodingLoop.__init__

    def as_on_cuda(self: Any, *args: Any, captures: bool = True, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.captures, self.is_on_cuda, self.has_fixed_shapes = captures, True, True

    monkeypatch.setattr(loop.DecodingLoop, "__init__", as_on_cuda)
    monkeypatch.setattr(loop, "FEWEST_ROWS", 2)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return captures


def test_rows_move_together_into_smaller_graphs(model, tokenizer, on_cuda):
    asked = requests(*MIXED * 3)
    expected = answer(HFBackend, model, tokenizer, asked, SAMPLING, batch_size=1)
    assert answer(FastBackend, model, tokenizer, asked, SAMPLING, batch_size=12) == expected
    sizes = [key[-1] for key in on_cuda if key is not None]
    assert sizes[0] == 12
    assert sizes[1:] in ([3], [2], [3, 2])


def test_what_was_made_ready_is_not_captured_again(model, tokenizer, on_cuda):
    kinds = (SAMPLING, GREEDY, SAMPLING | {"repetition_penalty": 1.3})
    asked = [replace(one, params=kinds[i % 3]) for i, one in enumerate(requests(*MIXED * 3))]
    expected = answer(HFBackend, model, tokenizer, asked, batch_size=1)
    backend = FastBackend(model, tokenizer, 0, Limits(batch_size=9))
    with torch.no_grad():
        backend.make_ready(asked)
        assert len(on_cuda) == 3 + 3 + 1  # 9, 3 and 2 rows; what is chosen between the steps has one size
        assert backend.generate(asked) == expected
        assert len(on_cuda) == 7


def test_when_compiling_fails_late_all_kinds_are_made_ready_again(model, tokenizer, on_cuda, monkeypatch):
    compiled: list[Any] = []

    def failing(*args: Any) -> Any:
        raise RuntimeError("planted")

    def compile(function: Any, **kwargs: Any) -> Any:
        compiled.append(function)
        return function if len(compiled) == 1 else failing

    monkeypatch.setattr(fast_backend, "_compile_failures", [])
    monkeypatch.setattr(torch, "compile", compile)
    kinds = (SAMPLING, SAMPLING | {"repetition_penalty": 1.3}, GREEDY)
    asked = [replace(one, params=kinds[i % 3]) for i, one in enumerate(requests(*MIXED))]
    expected = answer(HFBackend, model, tokenizer, asked, batch_size=1)
    backend = FastBackend(model, tokenizer, 0, Limits(batch_size=3, compile=True))
    with torch.no_grad():
        backend.make_ready(asked)
        assert fast_backend._compile_failures
        on_cuda.clear()
        assert backend.generate(asked) == expected
    assert not on_cuda
    assert len(compiled) == 2


def test_a_size_that_was_not_made_ready_is_neither_captured_nor_compiled(model, on_cuda):
    made_ready = loop.DecodingLoop(model, 4, 64, 8, compile=True)
    made_ready.seal()
    before = num_compiled()
    method = Method(Choice(LogitsProcessorList(), 90), (), 0)
    with torch.no_grad():
        for _ in range(3):
            made_ready.step("kind", method, 2)()
    assert not on_cuda
    assert num_compiled() == before


def num_compiled() -> int:
    return torch._dynamo.utils.counters["frames"]["total"]


def test_nothing_is_compiled_beside_training_where_there_are_no_graphs(model, tokenizer):
    kinds = (SAMPLING, SAMPLING | {"repetition_penalty": 1.3})
    asked = [replace(one, params=kinds[i % 2]) for i, one in enumerate(requests(*MIXED))]
    expected = answer(HFBackend, model, tokenizer, asked, batch_size=1)
    backend = FastBackend(model, tokenizer, 0, Limits(batch_size=3, compile=True))
    with torch.no_grad():
        backend.make_ready(asked)
        before = num_compiled()
        assert backend.generate(asked) == expected
    assert num_compiled() == before


def test_the_first_step_of_its_kind_warms_up(captures):
    calls: list[str] = []
    for name, num_calls, num_captures in (("first", 1, 0), ("first", 2, 1), ("second", 1, 1), ("other", 1, 0)):
        calls.clear()
        captures.clear()
        graph = CudaGraph(lambda name=name: calls.append(name), key=name == "other")
        for _ in range(num_calls):
            graph()
        assert (len(calls), len(captures)) == (num_calls, num_captures)


def test_what_is_not_warm_after_all_is_captured_at_the_second_call(captures, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(cuda_graph, "_captured", {"key"})
    capture = CudaGraph._capture
    failures = [UnsuitableError("planted")]

    def failing(self: CudaGraph) -> Any:
        if failures:
            raise failures.pop()
        return capture(self)

    monkeypatch.setattr(CudaGraph, "_capture", failing)
    graph = CudaGraph(lambda: calls.append(1), key="key")
    graph()
    assert (len(calls), len(captures)) == (1, 0)
    graph()
    assert (len(calls), len(captures)) == (2, 1)
    failures.append(UnsuitableError("planted"))
    unknown = CudaGraph(lambda: calls.append(1), key="unknown")
    unknown()
    with pytest.raises(UnsuitableError):
        unknown()
