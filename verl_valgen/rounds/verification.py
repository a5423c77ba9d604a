"""Proves a round's answers: the trainer's own model reads two of them, and would have chosen (nearly) every token.

The answers come from a copy of the weights, through a cache, in padded batches, perhaps through fused modules and a
captured graph. Any of these can be wrong for a model that nobody has tried, and then the answers look like answers. The
reader shares none of it: it is the sharded model in training, called as verl's validation calls it. This module decides
what is read by whom; reading.py has the readers, judging.py the rule, proven.py what follows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from verl_valgen.backends.hf import HFBackend, has_processors
from verl_valgen.backends.judging import logprobs
from verl_valgen.collectives import attempt, broadcast, rank, world_size
from verl_valgen.hosts.model_host import ModelHost
from verl_valgen.records import Completion, Request
from verl_valgen.rounds.needs import largest_reading_bytes
from verl_valgen.rounds.reading import (
    MAX_LOGPROB_GAP,
    Excerpt,
    Finding,
    Reading,
    agree_on_memory,
    agreed_finding,
    chosen_excerpts,
    each,
    loaded,
    objection_to,
    read_by_copy,
)
from verl_valgen.text import describe

logger = logging.getLogger(__name__)


def verify(reading: Reading, requests: Sequence[Request], completions: Sequence[Completion] | None) -> Finding:
    """Has two answers of a round read by the trainer's own model. Collective: all ranks must call.

    Even ranks read one and odd ranks the other in the same forward pass; a single rank reads one after the other. Where
    the model gives no logits, each copy reads both.

    Args:
        requests: The same on all ranks.
        completions: One for each request, on the logging rank; None there where there are none. What the others pass is
            not looked at.
    """
    host = reading.host
    chosen, error = attempt(lambda: chosen_excerpts(requests, completions or [], host.model_config))
    received = broadcast(chosen, host.is_logging_rank, host.device)
    if not received:
        return Finding(None, "no answer that could be read" if error is None else describe(error))
    excerpts = [Excerpt(requests[i], *fields) for i, *fields in received]
    if (reason := host.why_not_sharded()) is not None:
        if host.is_logging_rank:
            logger.debug("the trainer's model gives no logits to read the answers by: %s", reason)
        has_logprobs = all(excerpt.logprobs is not None for excerpt in excerpts)
        objections = _objections_to_logprobs if has_logprobs else _objections_of_copy
        result, error = attempt(lambda: objections(reading, excerpts))
    else:
        own = excerpts if world_size() == 1 else [excerpts[rank() % len(excerpts)]]
        result, error = attempt(lambda: _objections_of_trainer(reading, own))
    return agreed_finding(result, error, host.device)


# The readers


def _reading_bytes(host: ModelHost, own: Sequence[Excerpt]) -> int:
    """Of answers that are read one after the other: each is judged as it is without neighbours."""
    return largest_reading_bytes([[excerpt] for excerpt in own], host.model_config, host.compute_dtype)


def _objections_of_trainer(reading: Reading, own: Sequence[Excerpt]) -> list[str | None]:
    """What the model in training has against each answer that this rank reads. Collective: all ranks must call, with as
    many answers.

    Raises:
        MemoryError: On all ranks, where one has no room for the reading.
        Exception: On the rank concerned, after the last forward pass.
    """
    host = reading.host
    with loaded(host):
        agree_on_memory(host, _reading_bytes(host, own))
        read = [host.read([excerpt.input_ids], [len(excerpt.output_ids)])[0] for excerpt in own]
        processors = _logits_processors(reading, own)
    return each(
        partial(_objection, reading, *of_excerpt, host.compute_dtype)
        for of_excerpt in zip(own, read, processors, strict=True)
    )


def _objection(
    reading: Reading, excerpt: Excerpt, logits: Tensor, processors: LogitsProcessorList, dtype: torch.dtype
) -> str | None:
    """What a reader that computes in `dtype` has against an answer."""
    dtypes = (reading.dtype, dtype)
    return objection_to(excerpt, logits, processors, reading.seed, dtypes, reading.host.has_experts)


def _logits_processors(reading: Reading, own: Sequence[Excerpt]) -> list[LogitsProcessorList]:
    """What transformers makes of the requests' parameters, for the model in training. Not collective."""
    from verl_valgen.weights.sharded import generating_through

    if not any(has_processors(excerpt.request) for excerpt in own):
        return [LogitsProcessorList() for _ in own]
    host = reading.host
    with generating_through(host.model, reading.special_tokens, host.device) as model:
        backend = HFBackend(model, host.tokenizer, seed=0)
        return [backend.logits_processors(excerpt.request) for excerpt in own]


def _objections_to_logprobs(reading: Reading, own: Sequence[Excerpt]) -> list[str | None]:
    """What verl's own forward has against the log-probabilities that came with each answer. Collective: all ranks must
    call, with the same answers.

    Returns:
        [] on ranks that verl gives no output.
    """
    host = reading.host
    agree_on_memory(host, _reading_bytes(host, own))
    of_trainer = [host.mean_logprob(excerpt.input_ids, excerpt.output_ids) for excerpt in own]
    return [
        _other_mean("the answer came with", sum(excerpt.logprobs or ()) / len(excerpt.output_ids), found)
        for excerpt, found in zip(own, of_trainer, strict=True)
        if found is not None
    ]


def _other_mean(whose: str, logprob: float, of_trainer: float) -> str | None:
    if abs(logprob - of_trainer) <= MAX_LOGPROB_GAP:
        return None
    return f"{whose} a mean log-probability of {logprob:.2f}, the trainer's model gives it {of_trainer:.2f}"


@torch.no_grad()
def _objections_of_copy(reading: Reading, own: Sequence[Excerpt]) -> list[str | None]:
    """What the copy has against each answer, without a cache and without padding, and verl's own forward against the
    copy. Collective: all ranks must call, with the same answers.

    Returns:
        [] on ranks without a copy.

    Raises:
        MemoryError: On all ranks, where one has no room for the reading.
        Exception: On the rank concerned, after verl's last forward pass.
    """
    host = reading.host
    agree_on_memory(host, _reading_bytes(host, own))
    of_trainer = [reading.host.mean_logprob(excerpt.input_ids, excerpt.output_ids) for excerpt in own]
    if reading.copy is None:
        return []
    backend = HFBackend(reading.copy, reading.host.tokenizer, reading.seed)
    return each(
        partial(_objection_of_copy, reading, backend, *of_excerpt) for of_excerpt in zip(own, of_trainer, strict=True)
    )


def _objection_of_copy(reading: Reading, backend: HFBackend, excerpt: Excerpt, of_trainer: float | None) -> str | None:
    (logits,) = read_by_copy(backend.model, [excerpt.input_ids], [len(excerpt.output_ids)])
    found = _objection(reading, excerpt, logits, backend.logits_processors(excerpt.request), reading.dtype)
    if found is not None or of_trainer is None:
        return found
    logprob = logprobs(logits, excerpt.output_ids).mean().item()
    return _other_mean("the copy gives an answer", logprob, of_trainer)
