"""What a backend is: something that completes token ids. It never sees a tracker, a data set or verl."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from verl_valgen.samples import Completion, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Backend(ABC):
    """Completes requests, with the weights and the parameters that it was made with. Not collective.

    Args:
        model: A plain model, in eval mode. Its `generation_config` must hold the special token ids and nothing else.
        tokenizer: For stop strings alone.
        params: `transformers.GenerationConfig` fields, checked. The model's own defaults do not leak in.
        seed: Of the sampled tokens; see `sampling.gumbel_noise`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, params: Mapping[str, Any], seed: int
    ) -> None:
        self.model, self.tokenizer, self.params, self.seed = model, tokenizer, params, seed

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in the order of the requests.

        What a request is answered depends on that request alone, up to floating-point near-ties: not on its
        neighbours, their number or their order.
        """
