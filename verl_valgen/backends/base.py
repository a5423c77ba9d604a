"""What a backend is: something that completes token ids. It never sees a tracker, a data set or verl."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from verl_valgen.records import Completion, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class UnsuitableError(RuntimeError):
    """A backend's own way does not do for a model or a request; the message says why. Another way can begin anew."""


@dataclass(frozen=True)
class Limits:
    """What a backend has to keep within."""

    batch_size: int = 16
    """Most requests answered at once."""
    deadline: float = math.inf
    """`time.time()` after which nothing is begun; what is unfinished ends with the reason "time"."""
    compile: bool = False
    """Whether torch.compile may be used: the first use takes half a minute."""


class Backend(ABC):
    """Completes requests, with the weights that it was made with.

    Args:
        model: A plain model, in eval mode, for this backend alone: it may be changed. Its `generation_config` must hold
            the special token ids and nothing else.
        tokenizer: For stop strings alone.
        seed: Of the sampled tokens; see `sampling.stream_keys`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        limits: Limits = Limits(),
    ) -> None:
        self.model, self.tokenizer, self.seed, self.limits = model, tokenizer, seed, limits

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in the order of the requests. Not collective, unless a backend says so.

        What a request is answered depends on that request alone, up to floating-point near-ties: not on its
        neighbours, their number or their order. What fails for a request's parameters costs the requests that have the
        same: they end with the reason "error".

        Raises:
            torch.OutOfMemoryError: Not even one request fits.
        """
