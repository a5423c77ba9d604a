"""Proves a round's answers: the trainer's own model reads two of them, and would have chosen (nearly) every token.

The answers come from a copy of the weights, through a cache, in padded batches, perhaps through fused modules and a
captured graph. Any of these can be wrong for a model that nobody has tried, and then the answers look like answers. The
reader shares none of it: it is the sharded model in training, called as verl's validation calls it. This module decides
what is read by whom, and computes it; judging.py has the rule, proven.py what follows. (Over 200 lines, as what is
read and how go together.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PretrainedConfig

from verl_valgen.backends.batching import table_boundaries
from verl_valgen.backends.beams import beam_objection
from verl_valgen.backends.hf import HFBackend, has_processors
from verl_valgen.backends.judging import logprobs, objection, shortfalls, tolerance
from verl_valgen.backends.memory import fits
from verl_valgen.collectives import agree, attempt, broadcast, gather_values, rank, world_size
from verl_valgen.hosts.base import Host
from verl_valgen.records import Completion, Request
from verl_valgen.rounds.needs import reading_bytes
from verl_valgen.text import describe

logger = logging.getLogger(__name__)

_MAX_LOGPROB_GAP = 0.3
"""Nats. By so much an answer's mean log-probability may differ between the copy and verl's own forward."""


class Finding(NamedTuple):
    """What the check of a round's answers has found, the same on all ranks."""

    verified: bool | None
    """None where no check was possible."""
    reason: str = ""
    """What was seen, or why no check was possible."""


class Excerpt(NamedTuple):
    """An answer that is read."""

    request: Request
    output_ids: list[int]
    sum_logprob: float | None
    """See `Completion.sum_logprob`."""

    @property
    def input_ids(self) -> list[int]:
        """What is read. Of the answer's last token nothing is asked: the model never saw it when it answered."""
        return [*self.request.input_ids, *self.output_ids[:-1]]


@dataclass(frozen=True)
class Reading:
    """What is needed to read answers."""

    host: Host
    special_tokens: GenerationConfig
    """With the ids that end answers."""
    seed: int
    """`generation.seed`"""
    dtype: torch.dtype
    """The dtype that the answers were computed in."""
    copy: Any = None
    """This rank's copy of the model, if it has one, which reads where `host.why_not_sharded` gives a reason."""


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
    chosen, error = attempt(lambda: _chosen(requests, completions or [], host.model_config))
    received = broadcast(chosen, host.is_logging_rank, host.device)
    if not received:
        return Finding(None, "no answer that could be read" if error is None else describe(error))
    excerpts = [Excerpt(requests[i], *fields) for i, *fields in received]
    if (reason := host.why_not_sharded()) is not None:
        if host.is_logging_rank:
            logger.debug("the copy reads the answers, as the trainer's model gives no logits: %s", reason)
        result, error = attempt(lambda: _objections_of_copy(reading, excerpts))
    else:
        own = excerpts if world_size() == 1 else [excerpts[rank() % len(excerpts)]]
        result, error = attempt(lambda: _objections_of_trainer(reading, own))
    reports = gather_values([result, None if error is None else describe(error)], host.device)
    # An objection stands, whatever fails elsewhere.
    if found := [text for texts, _ in reports for text in texts or () if text is not None]:
        return Finding(False, found[0])
    if failures := [text for _, text in reports if text is not None]:
        return Finding(None, failures[0])
    return Finding(True)


def _chosen(
    requests: Sequence[Request], completions: Sequence[Completion], config: PretrainedConfig
) -> list[tuple[Any, ...]]:
    """The answers to read, at most two: the one behind the most padding, and the longest together with its prompt.

    What is sensitive to padding shows in the first, what is sensitive to length in the second. Each is the index of its
    request, and the other fields of its `Excerpt`.
    """
    readable = [i for i, (r, c) in enumerate(zip(requests, completions, strict=False)) if _is_readable(r, c, config)]
    if not readable:
        return []
    most_padded = max(readable, key=lambda i: (completions[i].num_padding, len(completions[i].output_ids)))
    others = [i for i in readable if i != most_padded]
    longest = max(others, key=lambda i: len(requests[i].input_ids) + len(completions[i].output_ids), default=None)
    chosen = [most_padded] if longest is None else [most_padded, longest]
    return [
        (i, completions[i].output_ids[: _num_readable(requests[i], config)], completions[i].sum_logprob) for i in chosen
    ]


def _num_readable(request: Request, config: PretrainedConfig) -> int | None:
    """How many of an answer's tokens one forward pass can judge; None: all.

    Beyond a length at which the rotary tables change it computes the tokens before with the tables of the longer
    sequence: other ones than they were chosen by.
    """
    boundary = min((length for length in table_boundaries(config) if length >= len(request.input_ids)), default=None)
    return None if boundary is None else boundary - len(request.input_ids) + 1


def _is_readable(request: Request, completion: Completion, config: PretrainedConfig) -> bool:
    """Whether an answer is words of the model, chosen in a way that a reader can follow: not by NaN, say."""
    params = request.params
    if params.get("guidance_scale") not in (None, 1.0):
        return False  # its processor runs the model, for every token
    if params.get("watermarking_config") and (params["do_sample"] or params.get("num_beams", 1) > 1):
        return False  # transformers applies it behind our noise, and behind what the beams' sums are taken from
    num_readable = _num_readable(request, config)
    is_whole = num_readable is None or len(completion.output_ids) <= num_readable
    follows = params.get("num_beams", 1) == 1 or (completion.sum_logprob is not None and is_whole)
    return follows and bool(completion.output_ids) and not completion.error and not completion.had_nan


# The readers


def _objections_of_trainer(reading: Reading, own: Sequence[Excerpt]) -> list[str | None]:
    """What the model in training has against each answer that this rank reads. Collective: all ranks must call, with as
    many answers.

    Raises:
        MemoryError: On all ranks, where one has no room for the reading.
        Exception: On the rank concerned, after the last forward pass.
    """
    host = reading.host
    with ExitStack() as stack:
        _, error = attempt(lambda: stack.enter_context(host.on_device()))
        if not agree(error is None, host.device):
            raise error or RuntimeError("another rank could not load its parameters")
        _agree_on_memory(host, own)
        read = [host.read(excerpt.input_ids, len(excerpt.output_ids)) for excerpt in own]
        processors = _logits_processors(reading, own)
    return _each(
        partial(_objection, reading, *of_excerpt, host.compute_dtype)
        for of_excerpt in zip(own, read, processors, strict=True)
    )


def _agree_on_memory(host: Host, own: Sequence[Excerpt]) -> None:
    """Raises MemoryError on all ranks where one has no room for its reading. Collective: all ranks must call."""
    config, dtype = host.model_config.get_text_config(), host.compute_dtype
    needs = max(reading_bytes(config, len(e.input_ids), len(e.output_ids), dtype) for e in own)
    # While one unit computes the next is gathered. Its size is that in float32.
    needs += 2 * host.largest_unit_bytes * dtype.itemsize // torch.float32.itemsize
    if not agree(fits(needs, host.device), host.device):
        raise MemoryError("there is no room for a forward pass of the trainer's model")


def _each(judgements: Iterable[Callable[[], str | None]]) -> list[str | None]:
    """The outcomes of all; raises what one has raised only where none objects."""
    outcomes = [attempt(judge) for judge in judgements]
    objections = [text for text, error in outcomes if error is None]
    errors = [error for _, error in outcomes if error is not None]
    if errors and not any(objections):
        raise errors[0]
    return objections


def _objection(
    reading: Reading, excerpt: Excerpt, logits: Tensor, processors: LogitsProcessorList, dtype: torch.dtype
) -> str | None:
    """What a reader that computes in `dtype` has against an answer."""
    request, output_ids = excerpt.request, excerpt.output_ids
    if excerpt.sum_logprob is None:
        tolerated = tolerance((reading.dtype, dtype), reading.host.has_experts)
        return objection(shortfalls(logits, request, output_ids, reading.seed, processors), tolerated)
    return beam_objection(logits, request, output_ids, excerpt.sum_logprob, processors)


def _logits_processors(reading: Reading, own: Sequence[Excerpt]) -> list[LogitsProcessorList]:
    """What transformers makes of the requests' parameters, for the model in training. Not collective."""
    from verl_valgen.weights.sharded import generating_through

    if not any(has_processors(excerpt.request) for excerpt in own):
        return [LogitsProcessorList() for _ in own]
    host = reading.host
    with generating_through(host.model, reading.special_tokens, host.device) as model:
        backend = HFBackend(model, host.tokenizer, seed=0)
        return [backend.logits_processors(excerpt.request) for excerpt in own]


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
    _agree_on_memory(reading.host, own)
    of_trainer = [reading.host.mean_logprob(excerpt.input_ids, excerpt.output_ids) for excerpt in own]
    if reading.copy is None:
        return []
    backend = HFBackend(reading.copy, reading.host.tokenizer, reading.seed)
    return _each(
        partial(_objection_of_copy, reading, backend, *of_excerpt) for of_excerpt in zip(own, of_trainer, strict=True)
    )


def _objection_of_copy(reading: Reading, backend: HFBackend, excerpt: Excerpt, of_trainer: float | None) -> str | None:
    model: Any = backend.model
    ids = torch.tensor([excerpt.input_ids], device=model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    logits = logits[-len(excerpt.output_ids) :]
    found = _objection(reading, excerpt, logits, backend.logits_processors(excerpt.request), reading.dtype)
    if found is not None or of_trainer is None:
        return found
    logprob = logprobs(logits, excerpt.output_ids).mean().item()
    if abs(logprob - of_trainer) <= _MAX_LOGPROB_GAP:
        return None
    return f"the copy gives an answer a mean log-probability of {logprob:.2f}, the trainer's model {of_trainer:.2f}"
