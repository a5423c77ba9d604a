"""What lets training go on while a round is answered: a thread with a stream of its own, and the memory that is left.

This module knows neither models nor trackers. Beside training nothing may be touched that the process has once: no
switch, no random state, no cache that is emptied. What ends a round (memory that is freed, workspaces, trackers) is
done on the trainer's thread, between two steps.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar

import torch

from verl_valgen.collectives import attempt
from verl_valgen.text import as_exception

T = TypeVar("T")

_MARGIN_BYTES = 2**30
"""For what training may need beyond its highest level so far; a plan leaves a share of the rest free besides."""


@functools.cache
def own_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of answers, one for the process: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


@contextmanager
def on_own_stream(device: torch.device) -> Iterator[None]:
    """While open, this thread's work goes to `own_stream`: behind what its own stream has, which then waits for it.

    What is allocated here for the answers belongs to their stream, so that their thread can free it: reused it is on
    that stream alone.
    """
    if device.type != "cuda":
        yield
        return
    own, current = own_stream(device), torch.cuda.current_stream(device)
    own.wait_stream(current)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        current.wait_stream(own)


class BesideTraining(Generic[T]):
    """A job on a thread of its own, which begins at once. Made, asked and let go of on the trainer's thread.

    The thread is a daemon: the process can end without it.

    Args:
        job: Without collectives. What it holds is let go of by `result`, on the trainer's thread: the memory of a copy
            that the trainer's stream has filled may be used again only when the answers' stream is done with it.
        device: What the job computes on.

    Raises:
        RuntimeError: There can be no more threads.
    """

    def __init__(self, job: Callable[[], T], device: torch.device) -> None:
        self._job: Callable[[], T] | None = job
        self._device = device
        self._value: Any = None
        self._error: Exception | None = None
        self._ended = threading.Event()
        if device.type == "cuda":
            own_stream(device).wait_stream(torch.cuda.current_stream(device))
        self._thread = threading.Thread(target=self._run, name="verl-valgen-answers", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Waits until the job is done, at most so long. Returns whether it is."""
        return self._ended.wait(timeout_s)

    def result(self) -> tuple[T | None, Exception | None]:
        """Waits for the job and lets go of it. Returns its value, or the exception that it raised, as `attempt` does.

        This thread's stream waits for what the job has given to the device.
        """
        self._ended.wait()
        self._thread.join()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_stream(own_stream(self._device))
        self._job = None
        return self._value, self._error

    def stop(self) -> None:
        """Ends the job, as an exit within its thread would, at the next operation that is Python's own.

        No loop has to look for it, be it transformers' or a model's. For a process that is to end: a thread that still
        computes then may take it down.
        """
        thread_id, exit = ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(SystemExit)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, exit)

    def _run(self) -> None:
        # Who leaves its thread's outermost autocast empties the cache of cast weights, which all threads share: the
        # trainer's forward pass, under way, would cast again, and round its gradients otherwise. The model's code has
        # such blocks; here none is the outermost one. The count is by thread, and ends with it.
        torch.autocast_increment_nesting()
        try:
            with ExitStack() as stack:
                if self._device.type == "cuda":  # what is current is so by thread
                    torch.cuda.set_device(self._device)
                    stack.enter_context(torch.cuda.stream(own_stream(self._device)))
                stack.enter_context(torch.no_grad())
                assert self._job is not None
                self._value, self._error = attempt(self._job)
        except BaseException as e:  # an exit of the thread is none of the program
            self._error = as_exception(e)
        finally:
            self._ended.set()


class TrainingMemory:
    """What training leaves free of a device at its highest level so far; everything, except on CUDA.

    PyTorch's peak is read and never reset: it is the trainer's too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.level = 0
        """Bytes allocated at the highest level of a training step."""
        self.held = 0
        """Bytes allocated for the round that is under way, which are none of training's.

        The thread frees the answers' cache and graphs before the round ends, and they still count: where training comes
        to its highest level after that, `level` is so much too low.
        """
        self._peak = 0
        self._allocated = 0

    def note(self) -> None:
        """To be called between training steps, the oftener the better: a trainer may reset the peak."""
        if self.device.type != "cuda":
            return
        peak = torch.cuda.max_memory_allocated(self.device)
        if peak != self._peak:
            self.level, self._peak = max(self.level, peak - self.held), peak

    def before_gather(self) -> None:
        """Notes what is allocated without a round."""
        self.note()
        self._allocated = self._now()

    def begin_holding(self) -> None:
        """What has been allocated since `before_gather` is the round's, until `end_holding`."""
        self.held = max(0, self._now() - self._allocated)

    def end_holding(self) -> None:
        """The peak so far was beside what the round held; later ones are training's alone."""
        self.note()
        self.held = 0

    def leave_out(self) -> None:
        """The peak so far is not training's. To be called only where `level` is known from a training step."""
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self.device)

    def _now(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def free_bytes(self) -> float:
        """Bytes that a round may take while training goes on."""
        if self.device.type != "cuda":
            return math.inf
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(0, free + torch.cuda.memory_reserved(self.device) - self.level - _MARGIN_BYTES)
