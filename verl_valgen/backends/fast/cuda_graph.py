"""Runs a function on tensors that stay where they are as one CUDA graph. Knows nothing of what the function does."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from verl_valgen.backends.base import UnsuitableError

_captured: set[Hashable] = set()
"""The keys of functions that were captured in this process: what they use is warm."""


class CudaGraph:
    """Calls a function: the first time as it is, which also warms up what it uses, from then on as a graph.

    Where one with the same key was captured before it is a graph from the first time on.

    Args:
        function: Without arguments; it reads and writes tensors that stay where they are. Must not hold this object:
            the graph's memory would be free only after a garbage collection.
        pool: Of `torch.cuda.graph_pool_handle`: graphs with the same share their memory. They must not run at the same
            time, and what one returns holds until the next one runs.
        key: Equal for functions that launch the same kernels, on other tensors; None: nothing is known of others.
    """

    def __init__(self, function: Callable[[], Tensor | None], pool: Any = None, key: Hashable = None) -> None:
        self.function, self.pool, self.key = function, pool, key
        self.is_warm = self.is_taken_for_warm = key in _captured
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None

    def __call__(self) -> Tensor | None:
        """Returns the function's result; of a graph always in the same tensor, written anew.

        Raises:
            UnsuitableError: The function cannot be captured: it asks the host for a value, say.
        """
        if not self.is_warm:
            self.is_warm = True
            return self.function()
        if self.graph is None:
            try:
                self.graph = self._capture()
            except UnsuitableError:
                if not self.is_taken_for_warm:
                    raise
                self.is_taken_for_warm = False
                return self.function()
            if self.key is not None:
                _captured.add(self.key)
        self.graph.replay()
        return self.output

    def _capture(self) -> torch.cuda.CUDAGraph:
        # `torch.cuda.graph` would empty the allocator's cache, which the trainer had to fill again.
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with _no_garbage_collection(), torch.cuda.stream(stream):
                # "thread_local": other threads, NCCL's watchdog for one, may go on.
                graph.capture_begin(self.pool, capture_error_mode="thread_local")
                try:
                    self.output = self.function()
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            first_line = str(e).partition("\n")[0]
            raise UnsuitableError(f"a step cannot be captured: {type(e).__name__}: {first_line}") from e
        torch.cuda.current_stream().wait_stream(stream)
        return graph


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """Returns one stream for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switches garbage collection off: freeing an older graph, say, may call CUDA and so make a capture fail."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
