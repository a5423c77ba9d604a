"""The contract of a backend: it completes token ids. It never sees a tracker, a data set or verl."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from verl_valgen.records import Completion, Request


class UnsuitableError(RuntimeError):
    """A backend's own method cannot serve a model or a request; the message says why. Another method may begin anew."""


@dataclass(frozen=True)
class Limits:
    """Bounds that a backend keeps within."""

    batch_size: int = 16
    """The largest number of requests in one batch."""
    deadline: float = math.inf
    """`time.time()` after which no batch is begun; answers that are unfinished then end with the reason "time"."""
    compile: bool = False
    """Whether torch.compile may be used: the first use takes half a minute."""
    fuse: bool = True
    """Whether a backend may replace the model's modules by ones with fewer kernels."""
    one_at_a_time: bool = False
    """Whether every request has a batch of its own, whatever `batch_size` says."""


class Backend(ABC):
    """Completes requests with the weights of one model.

    Args:
        model: An unsharded model in eval mode, for this backend alone, which may change it. Its `generation_config`
            must hold the special token ids and nothing else.
        tokenizer: Used for stop strings only.
        seed: In [0, 2**64); the seed of the sampled tokens, see `sampling.stream_keys`.
        limits: Batch size, deadline, and whether to compile.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        limits: Limits = Limits(),
    ) -> None:
        self.model, self.tokenizer, self.seed, self.limits = model, tokenizer, seed, limits
        self.on_answers: Callable[[int], None] = lambda num_answers: None
        """Called by `generate`, between batches, with the number of answers that have come to an end since the last
        call: to show how far it is. Nothing may depend on it."""

    @classmethod
    def refills_rows(cls, requests: Sequence[Request]) -> bool:
        """Whether a request that waits takes the place of one that has ended, with any of these requests' parameters;
        else batches run until all have. (What the model says to it is not asked.)"""
        return False

    def make_ready(self, requests: Sequence[Request]) -> None:  # noqa: B027  (most need nothing)
        """Does now what `generate` must not do for these requests while training goes on in another thread.

        That is all that looks beyond the model: capturing graphs, compiling, trying what a model can do. Afterwards
        `generate` with the same requests neither captures nor touches a switch of the process. Not collective.
        """

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Returns one completion per request, in the order of the requests. Not collective, unless a backend says so.

        The answer to a request depends on that request alone, up to floating-point near-ties: not on the others, their
        number or their order. Where a request's parameters make generation fail, only requests with the same parameters
        are lost: they end with the reason "error".

        Raises:
            torch.OutOfMemoryError: Not even one request fits.
        """

    def restore(self) -> None:  # noqa: B027  (most change nothing)
        """Undoes what the backend has made of the model, for those who want it afterwards."""
