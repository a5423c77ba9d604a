"""Proves a round's answers: the trainer's own model reads two of them, and would have chosen (nearly) every token.

The answers come from a copy of the weights, through a cache, in padded batches, perhaps through fused modules and a
captured graph. Any of these can be wrong for a model that nobody has tried, and then the answers look like answers. The
reader shares none of it: it is the sharded model in training, called as verl's validation calls it. This module decides
what is read by whom, and what follows for the round; judging.py has the rule.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from transformers import LogitsProcessorList

from verl_valgen.backends.hf import HFBackend
from verl_valgen.backends.judging import objection, shortfalls
from verl_valgen.collectives import agree, attempt, broadcast, gather_values, rank, world_size
from verl_valgen.hosts.base import Host
from verl_valgen.records import Completion, Request
from verl_valgen.rounds.plan import fits, reading_bytes
from verl_valgen.settings.generation_config import special_tokens
from verl_valgen.text import describe

logger = logging.getLogger(__name__)


class Finding(NamedTuple):
    """What the check of a round's answers has found, the same on all ranks."""

    verified: bool | None
    """None where no check was possible."""
    reason: str = ""
    """What was seen, or why no check was possible."""


class Excerpt(NamedTuple):
    """An answer that is read."""

    request: int
    """The index of its request."""
    output_ids: list[int]


def verify(host: Host, requests: Sequence[Request], completions: Sequence[Completion] | None, seed: int) -> Finding:
    """Has two answers of a round read by the trainer's own model. Collective: all ranks must call.

    Even ranks read one and odd ranks the other in the same forward pass; a single rank reads one after the other.

    Args:
        requests: The same on all ranks.
        completions: One for each request, on the logging rank; None there where there are none. What the others pass is
            not looked at.
        seed: `generation.seed`.
    """
    chosen, error = attempt(lambda: excerpts(requests, completions or []))
    received = broadcast(chosen, host.is_logging_rank, host.device)
    if not received:
        return Finding(None, "no answer that could be read" if error is None else describe(error))
    reads = [Excerpt(*fields) for fields in received]
    own = reads if world_size() == 1 else [reads[rank() % len(reads)]]
    objections, error = attempt(lambda: _objections(host, requests, own, seed))
    reports = gather_values([objections, None if error is None else describe(error)], host.device)
    failures = [text for _, text in reports if text is not None]
    if failures:
        return Finding(None, failures[0])
    found = [text for texts, _ in reports for text in texts if text is not None]
    return Finding(not found, found[0] if found else "")


def excerpts(requests: Sequence[Request], completions: Sequence[Completion]) -> list[Excerpt]:
    """The answers to read, at most two: the one behind the most padding, and the longest together with its prompt.

    What is sensitive to padding shows in the first, what is sensitive to length in the second. Left out are answers
    that are no words of the model: failures, and those that NaN has chosen.
    """
    readable = [i for i, c in enumerate(completions) if c.output_ids and not c.error and not c.had_nan]
    if not readable:
        return []
    most_padded = max(readable, key=lambda i: (completions[i].num_padding, len(completions[i].output_ids)))
    others = [i for i in readable if i != most_padded]
    longest = max(others, key=lambda i: len(requests[i].input_ids) + len(completions[i].output_ids), default=None)
    return [Excerpt(i, completions[i].output_ids) for i in (most_padded, longest) if i is not None]


def _objections(host: Host, requests: Sequence[Request], own: Sequence[Excerpt], seed: int) -> list[str | None]:
    """What the trainer's model has against each answer that this rank reads. Collective: all ranks must call.

    Raises:
        MemoryError: On all ranks, where one has no room for the reading.
        Exception: On the rank concerned, after the last forward pass.
    """
    with ExitStack() as stack:
        _, error = attempt(lambda: stack.enter_context(host.on_device()))
        if not agree(error is None, host.device):
            raise error or RuntimeError("another rank could not load its parameters")
        sizes = [(len(requests[i].input_ids) + len(output_ids), len(output_ids)) for i, output_ids in own]
        needs = max(reading_bytes(host.model_config.get_text_config(), *size, host.compute_dtype) for size in sizes)
        if not agree(fits(needs + 2 * host.largest_unit_bytes, host.device), host.device):
            raise MemoryError("there is no room for a forward pass of the trainer's model")
        # Of the last token nothing is asked: the model never saw it when it answered.
        read: list[Any] = [host.read([*requests[i].input_ids, *ids[:-1]], len(ids)) for i, ids in own]
        processors = _logits_processors(host, [requests[i] for i, _ in own])
    return [
        objection(shortfalls(logits, requests[i], ids, seed, of_request))
        for (i, ids), logits, of_request in zip(own, read, processors, strict=True)
    ]


def _logits_processors(host: Host, requests: Sequence[Request]) -> list[LogitsProcessorList]:
    """What transformers makes of the requests' parameters, for the model in training. Not collective."""
    from verl_valgen.weights.sharded import generating_through

    with generating_through(host.model, special_tokens(host.generation_config, host.tokenizer), host.device) as model:
        backend = HFBackend(model, host.tokenizer, seed=0)
        return [backend.logits_processors(request) for request in requests]
