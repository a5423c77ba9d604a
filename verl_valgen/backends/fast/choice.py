"""How a step chooses the next tokens: logits processors as tensor operations that one CUDA graph can hold.

On CUDA the usual ones run as Triton kernels (kernels/sampling.py), with the same results. This module knows
transformers' processors; it knows no model and no cache.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from verl_valgen.backends.fast.kernels import are_available
from verl_valgen.backends.observers import NanObserver, has_nan
from verl_valgen.backends.sampling import GumbelNoise, gumbel_noise, perturbed

CAPTURABLE = (
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper,
    EpsilonLogitsWarper, EtaLogitsWarper, InfNanRemoveLogitsProcessor, LogitNormalization, GumbelNoise, NanObserver,
)  # fmt: skip
"""Logits processors that a graph can hold: they look at the scores alone, in any order of the tokens, and need nothing
from the host. Others run between two steps. (In place of the two that differ from batch to batch, GumbelNoise and
NanObserver, `Choice` has operations of its own.)"""

_SERVED_BY_KERNELS: tuple[tuple[type, str], ...] = (
    (TemperatureLogitsWarper, "temperature"), (TopKLogitsWarper, "top_k"), (TopPLogitsWarper, "top_p"),
    (MinPLogitsWarper, "min_p"), (GumbelNoise, ""),
)  # fmt: skip
"""The processors that kernels serve, and what a kernel is told of each. Each at most once, in this order."""


class Chosen(NamedTuple):
    """The next tokens of B sequences, and what was seen on the way."""

    tokens: Tensor
    """(B,) int64."""
    had_nan: Tensor
    """(B,) bool: NaN was among the scores."""
    had_too_many_ties: Tensor
    """(B,) bool: more tokens tie with the last of the top_k than were looked at, so that the token may be another."""


class Choice:
    """Applies processors, all of them `CAPTURABLE`, and takes the best token.

    Args:
        processors: transformers' list. Their order counts.
        vocab_size: V.
    """

    def __init__(self, processors: LogitsProcessorList, vocab_size: int) -> None:
        self.processors = processors
        top_k = next((processor.top_k for processor in processors if isinstance(processor, TopKLogitsWarper)), None)
        self.num_candidates = None if top_k is None or (num := max(128, 2 * top_k)) >= vocab_size else num
        self.for_kernels = None if top_k is not None and self.num_candidates is None else for_kernels(processors)

    @property
    def sorts_the_vocabulary(self) -> bool:
        """Whether some processor sorts all tokens."""
        return self.num_candidates is None and not all(isinstance(p, NanObserver) for p in self.processors)

    def __call__(self, scores: Tensor, noise_keys: Tensor | None) -> Chosen:
        """Chooses from (B, V) scores of any floating type, as from their float32 copy. Waits for no device.

        From top-k on only the largest scores are processed, as a vocabulary is a thousand times larger. They are more
        than k, since transformers keeps what ties with the k-th.

        Args:
            noise_keys: (B,) int64, see `sampling.stream_keys`; None where no `GumbelNoise` is among the processors.
        """
        if self.for_kernels is not None and not torch.compiler.is_compiling() and are_available(scores.device):
            from verl_valgen.backends.fast.kernels import sampling

            warping = sampling.Warping(**self.for_kernels)
            if sampling.can_choose(scores, self.num_candidates):
                tokens, had_nan, ties = sampling.choose(scores, noise_keys, warping, self.num_candidates)
                return Chosen(tokens, had_nan, torch.zeros_like(had_nan) if ties is None else ties)
        scores = scores.float()
        had_nan = had_too_many_ties = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        no_ids = torch.empty(len(scores), 0, dtype=torch.int64, device=scores.device)  # what processors are passed
        candidates: Tensor | None = None  # (B, C) token ids of the columns of `scores`; None: all in their order
        for processor in self.processors:
            if isinstance(processor, GumbelNoise):
                assert noise_keys is not None
                if candidates is None:
                    scores = perturbed(scores, noise_keys)
                else:
                    scores = scores + gumbel_noise(noise_keys[:, None], candidates)
            elif isinstance(processor, NanObserver):
                had_nan = had_nan | has_nan(scores)
            elif isinstance(processor, TopKLogitsWarper) and self.num_candidates is not None:
                scores, candidates = scores.topk(self.num_candidates)  # the largest first
                scores = processor(no_ids, scores)
                had_too_many_ties = scores[:, -1] > -torch.inf
            else:
                scores = processor(no_ids, scores)
        best = scores.argmax(-1, keepdim=True)
        return Chosen((best if candidates is None else candidates.gather(1, best))[:, 0], had_nan, had_too_many_ties)


def for_kernels(processors: LogitsProcessorList) -> dict[str, Any] | None:
    """The fields of `kernels.sampling.Warping` that do what processors do, None where kernels do not serve them."""
    warpers = [processor for processor in processors if not isinstance(processor, NanObserver)]
    classes = [served for served, _ in _SERVED_BY_KERNELS]
    if any(type(warper) not in classes for warper in warpers) or len(warpers) == len(processors):
        return None
    places = [classes.index(type(warper)) for warper in warpers]
    if places != sorted(set(places)):
        return None
    fields: dict[str, Any] = {"has_noise": classes.index(GumbelNoise) in places}
    for warper, place in zip(warpers, places, strict=True):
        if getattr(warper, "filter_value", -math.inf) != -math.inf or getattr(warper, "min_tokens_to_keep", 1) != 1:
            return None
        if name := _SERVED_BY_KERNELS[place][1]:
            fields[name] = getattr(warper, name)
    return fields if fields.get("top_p", 0.0) < 1 else None
