"""The contract of a backend: it completes token ids, with weights that its loader has brought. It never sees a tracker,
a data set or verl.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from verl_valgen.records import Completion, Request

_T = TypeVar("_T")


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
    logprobs: bool = False
    """Whether greedy answers, too, must come with the log-probabilities of their tokens, where a backend can give them:
    where there are no logits to judge them by."""


class WeightSource(Protocol):
    """The trainer's model, as a loader sees it: whole tensors under names, however it is sharded."""

    @property
    def device(self) -> torch.device: ...
    @property
    def model_class(self) -> type: ...
    @property
    def model_config(self) -> PretrainedConfig: ...

    def stream(
        self, consume: Callable[[Iterator[tuple[str, Tensor]]], _T], dtype: torch.dtype, *, keep: bool
    ) -> _T | None:
        """Hands every weight on, as a checkpoint has them. Collective. See `ModelHost.stream`."""
        ...

    def gather(self, dtype: torch.dtype, *, keep: bool) -> PreTrainedModel | None:
        """Makes a plain copy of the same weights. Collective. See `ModelHost.gather`."""
        ...


@dataclass(frozen=True)
class Work:
    """What weights are wanted for. The same on all ranks, but for the share."""

    requests: Sequence[Request]
    """All of the round."""
    share: Sequence[Request]
    """Those that this rank answers, perhaps with others; empty on a rank that answers none."""
    dtype: torch.dtype
    """Of the computation."""
    batch_size: int
    """Most requests at once."""
    ranks_per_copy: int = 1
    """The ranks that hold one copy of the weights together: contiguous groups of all ranks."""
    cache_bytes: int = 0
    """What the keys and values of `batch_size` of the longest sequences take on one device."""
    compile: bool = False
    """See `Limits.compile`."""


class Loader(ABC):
    """Brings the weights of the moment to where a backend answers with them. Every rank has one, for the whole run."""

    @property
    def ranks_per_kept_copy(self) -> int:
        """How many ranks hold a copy together in what this rank keeps from round to round; 0: it keeps nothing."""
        return 0

    @abstractmethod
    def load(self, source: WeightSource, work: Work) -> Any:
        """Returns what the backend is made with; None on a rank that answers nothing. Collective: all ranks must call.

        Raises:
            Exception: What prevented it, after the last collective, on the rank concerned at least.
        """

    def release(self) -> None:  # noqa: B027  (a copy is gone with its last reference)
        """Called on every rank when the answers are there: gives training the memory back. Not collective."""

    def close(self) -> None:  # noqa: B027  (as above)
        """Called on every rank when the backend will answer no more in this run: gives back what is left."""


class PlainLoader(Loader):
    """Builds a plain copy of the model: a module of its own, which the backend may change."""

    def load(self, source: WeightSource, work: Work) -> PreTrainedModel | None:
        return source.gather(work.dtype, keep=bool(work.share))


class Backend(ABC):
    """Completes requests with the weights of one model.

    Args:
        model: An unsharded model in eval mode, for this backend alone, which may change it. Its `generation_config`
            must hold the special token ids and nothing else.
        tokenizer: Used for stop strings only.
        seed: In [0, 2**64); the seed of the sampled tokens, see `sampling.stream_keys`.
        limits: Batch size, deadline, and whether to compile.
    """

    loader: ClassVar[type[Loader]] = PlainLoader
    """What brings the weights that it answers with."""

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
