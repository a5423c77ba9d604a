"""Finds out which prompts may share a batch in Hugging Face's loop, by trying.

Masks hide padding from attention, but not from every recurrent or convolutional layer, and not from models that count
positions by themselves: there an answer depends on its neighbours. No list of architectures would be complete, so a
model is tried once per process; what was found is kept.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from verl_valgen.backends.padding import Sharing, left_pad
from verl_valgen.backends.trial import (
    NUM_STEPS,
    coarse_tolerance,
    difference,
    full_logits,
    model_key,
    same_kernels_tolerance,
    sequences_for_trial,
    tolerance,
)
from verl_valgen.collectives import attempt
from verl_valgen.text import describe

if TYPE_CHECKING:
    from verl_valgen.backends.hf import HFBackend
    from verl_valgen.records import Request

logger = logging.getLogger(__name__)

_NO_TOKEN = 2**31 - 1
_RUNGS = (
    (Sharing.ANY_LENGTHS, (1, 0), "padding"),
    (Sharing.EQUAL_LENGTHS, (0, 2), "a neighbour of its length"),
    (Sharing.NONE, (0,), "transformers' cache"),
    (Sharing.NOT_EVEN_A_CACHE, (0,), "transformers' loop"),
)
"""What may be found, the sequences of `sequences_for_trial` that it is tried with, and what it shows if it fails."""

_findings: dict[str, Sharing] = {}
"""By `model_key`. A round has a new copy of the same model."""


def known_sharing(model: Any) -> Sharing | None:
    """What `how_to_share` has found of a model; None where it was not asked."""
    return _findings.get(model_key(model))


@torch.no_grad()
def how_to_share(
    backend: HFBackend,
    requests: Sequence[Request],
    max_length: float,
    agree: Callable[[bool], bool] = lambda ok: ok,
) -> Sharing:
    """Finds out which prompts may share a batch in Hugging Face's loop.

    With a sharded model collective: all ranks must call. They run the same number of forward passes.

    Args:
        backend: Its `call_generate` is what is tried.
        requests: Whose tokens are used.
        max_length: The most tokens to try with, see `batching.even_length`.
        agree: Makes one answer of all ranks'.
    """
    model, key = backend.model, model_key(backend.model)
    if agree(key in _findings):
        return _findings[key]
    sequences = sequences_for_trial(requests, max_length)
    expected, error = attempt(lambda: [full_logits(model, sequence) for sequence in sequences])
    if not agree(error is None):  # what fails here will be reported where an answer fails
        name, why = type(model).__name__, "another rank's failed" if error is None else describe(error)
        logger.debug("%s: one prompt at a time, as a forward pass without a cache failed: %s", name, why)
        return _remembered(key, Sharing.NONE, [error])
    if not agree(all(bool(logits.isfinite().all()) for logits in expected)):
        return Sharing.ANY_LENGTHS  # a model that has diverged tells nothing
    sharing, errors = Sharing.NONE, []
    for rung, indices, what in _RUNGS:
        tried = [sequences[i] for i in indices]
        of_forward = torch.cat([expected[i] for i in indices])
        run = functools.partial(_generated_logits, backend, tried, use_cache=rung is not Sharing.NOT_EVEN_A_CACHE)
        most = coarse_tolerance(model) if rung is Sharing.NONE else tolerance(model)
        logits, is_right, error = _compare(run, of_forward, most, model, what)
        errors.append(error)
        if not agree(is_right):
            continue
        if rung is Sharing.ANY_LENGTHS:
            most = same_kernels_tolerance(model)
            pad_id = max(tried[0])  # any other than 0: what the padding is must not matter
            _, is_right, error = _compare(functools.partial(run, pad_id=pad_id), logits, most, model, "another padding")
            errors.append(error)
            if not agree(is_right):
                continue
        sharing = rung
        break
    return _remembered(key, sharing, errors)


def _remembered(key: str, sharing: Sharing, errors: Sequence[Exception | None]) -> Sharing:
    if not any(isinstance(error, torch.OutOfMemoryError) for error in errors):
        _findings[key] = sharing
    return sharing


def _compare(
    run: Callable[[], Tensor], expected: Tensor, most: float, model: Any, what: str
) -> tuple[Tensor, bool, Exception | None]:
    """Returns the logits that `run` gives, whether they are those expected up to `most`, and why there are none."""
    logits, error = attempt(run)
    gap = math.inf if error is not None else difference(expected, logits, model.dtype)
    if gap > most:
        why = f"its logits by {gap:.2g}" if error is None else describe(error)
        logger.debug("%s: %s changes an answer (%s)", type(model).__name__, what, why)
    return logits, gap <= most, error


def _generated_logits(
    backend: HFBackend, sequences: Sequence[list[int]], *, use_cache: bool, pad_id: int = 0
) -> Tensor:
    """Returns the (B, NUM_STEPS + 1, V) float32 logits that `generate` sees on its way through the sequences."""
    device = backend.model.device
    input_ids, attention_mask = left_pad([sequence[:-NUM_STEPS] for sequence in sequences], device, pad_id)
    forcing = _Forcing(torch.tensor([sequence[-NUM_STEPS:] for sequence in sequences], device=device))
    backend.call_generate(
        input_ids,
        attention_mask=attention_mask,
        generation_config=GenerationConfig(
            max_new_tokens=NUM_STEPS + 1,
            do_sample=False,
            eos_token_id=_NO_TOKEN,
            pad_token_id=0,
            use_cache=use_cache,
        ),
        logits_processor=LogitsProcessorList([forcing]),
        stopping_criteria=StoppingCriteriaList(),
    )
    return torch.stack(forcing.logits, dim=1)


class _Forcing(LogitsProcessor):
    """Notes the logits and lets the given tokens be chosen, then any.

    Args:
        tokens: (B, NUM_STEPS) int64.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.logits)
        self.logits.append(scores.clone())
        forced = self.tokens[:, min(step, NUM_STEPS - 1), None]
        return torch.full_like(scores, -torch.inf).scatter(1, forced, 0.0)
