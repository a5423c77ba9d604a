"""What reads a round's answers and the rows of its prompts: the model in training, and its copy.

Shared by the proof of the answers (verification.py) and by the two links that prove what is answered while training
goes on (links.py). judging.py and comparing.py have the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PretrainedConfig

from verl_valgen.backends.batching import table_boundaries
from verl_valgen.backends.beams import beam_objection
from verl_valgen.backends.judging import logprob_gaps, objection, shortfalls, tolerance
from verl_valgen.backends.memory import fits
from verl_valgen.collectives import agree, attempt, gather_values
from verl_valgen.records import Completion, Request
from verl_valgen.text import describe

if TYPE_CHECKING:
    from verl_valgen.hosts.model_host import ModelHost

MAX_LOGPROB_GAP = 0.3
"""Nats. By so much the mean log-probability of a text may differ between the copy and verl's own forward."""


class Finding(NamedTuple):
    """What a check of a round has found."""

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
    logprobs: Sequence[float] | None = None
    """See `Completion.logprobs`."""

    @property
    def input_ids(self) -> list[int]:
        """What is read. Of the answer's last token nothing is asked: the model never saw it when it answered."""
        return [*self.request.input_ids, *self.output_ids[:-1]]


@dataclass(frozen=True)
class Reading:
    """What is needed to read."""

    host: ModelHost
    special_tokens: GenerationConfig
    """With the ids that end answers."""
    seed: int
    """`generation.seed`"""
    dtype: torch.dtype
    """The dtype that the answers are computed in."""
    copy: Any = None
    """This rank's copy of the model, if it has one."""


# What is read


def chosen_excerpts(
    requests: Sequence[Request], completions: Sequence[Completion], config: PretrainedConfig
) -> list[tuple[Any, ...]]:
    """The answers to read, at most two: one whose row of the cache had others before it, beside the most padding, and
    the longest together with its prompt.

    What is sensitive to neighbours shows in the first, what is sensitive to length in the second. Each is the index of
    its request, and the other fields of its `Excerpt`.
    """
    readable = [i for i, (r, c) in enumerate(zip(requests, completions, strict=False)) if _is_readable(r, c, config)]
    if not readable:
        return []
    beside_others = max(readable, key=lambda i: _beside_others(completions[i]))
    others = [i for i in readable if i != beside_others]
    longest = max(others, key=lambda i: len(requests[i].input_ids) + len(completions[i].output_ids), default=None)
    chosen = [beside_others] if longest is None else [beside_others, longest]
    return [(i, *_read_of(completions[i], _num_readable(requests[i], config))) for i in chosen]


def _read_of(completion: Completion, num: int | None) -> tuple[Any, ...]:
    logprobs = None if completion.logprobs is None else list(completion.logprobs)[:num]
    return completion.output_ids[:num], completion.sum_logprob, logprobs


def _beside_others(completion: Completion) -> tuple[int, ...]:
    """How much could be wrong with an answer because of others: the larger, the more."""
    return min(completion.num_before, 1), completion.num_padding, len(completion.output_ids)


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


# Who reads


@contextmanager
def loaded(host: ModelHost) -> Iterator[None]:
    """While open, the parameters are on the device. Entering is collective: all ranks must.

    Raises:
        Exception: On all ranks, where one could not load its parameters.
    """
    with ExitStack() as stack:
        _, error = attempt(lambda: stack.enter_context(host.on_device()))
        if not agree(error is None, host.device):
            raise error or RuntimeError("another rank could not load its parameters")
        yield


def agree_on_memory(host: ModelHost, num_bytes: int) -> None:
    """Raises MemoryError on all ranks where one has no room for its reading. Collective: all ranks must call.

    Args:
        num_bytes: That this rank's reading takes, see `needs.largest_reading_bytes`.
    """
    # While one unit computes the next is gathered. Its size is that in float32.
    units = 2 * host.largest_unit_bytes * host.compute_dtype.itemsize // torch.float32.itemsize
    if not agree(fits(num_bytes + units, host.device), host.device):
        raise MemoryError("there is no room for a forward pass of the trainer's model")


@torch.no_grad()
def read_by_copy(model: Any, texts: Sequence[Sequence[int]], nums_last: Sequence[int]) -> list[Tensor]:
    """A copy's logits (N, V) at the last N positions of each text, in one pass without a cache. Not collective.

    A single text is without padding; several are beside each other, see `last_logits`.
    """
    from verl_valgen.weights.texts import last_logits

    return last_logits(model, model.forward, texts, nums_last, model.device)


# What they have against an answer


def objection_to(
    excerpt: Excerpt,
    logits: Tensor,
    processors: LogitsProcessorList,
    seed: int,
    dtypes: Iterable[torch.dtype],
    has_experts: bool,
) -> str | None:
    """What a reader has against an answer by its logits; `dtypes` are the answer's and the reader's."""
    request, output_ids = excerpt.request, excerpt.output_ids
    if excerpt.sum_logprob is None:
        tolerated = tolerance(dtypes, has_experts)
        if excerpt.logprobs is not None and request.params["do_sample"]:
            gaps = logprob_gaps(logits, request, output_ids, excerpt.logprobs)
            return objection(gaps, tolerated, "were drawn by other probabilities than the trainer's model gives them")
        return objection(shortfalls(logits, request, output_ids, seed, processors), tolerated)
    return beam_objection(logits, request, output_ids, excerpt.sum_logprob, processors)


def each(judgements: Iterable[Callable[[], str | None]]) -> list[str | None]:
    """The outcomes of all; raises what one has raised only where none objects."""
    outcomes = [attempt(judge) for judge in judgements]
    objections = [text for text, error in outcomes if error is None]
    errors = [error for _, error in outcomes if error is not None]
    if errors and not any(objections):
        raise errors[0]
    return objections


def agreed_finding(objections: Sequence[str | None] | None, error: Exception | None, device: torch.device) -> Finding:
    """Makes one finding of what all ranks have read. Collective: all ranks must call.

    Args:
        objections: This rank's, one for each text that it read; None where it failed.
        error: Why it failed.
    """
    reports = gather_values([objections, None if error is None else describe(error)], device)
    # An objection stands, whatever fails elsewhere.
    if found := [text for texts, _ in reports for text in texts or () if text is not None]:
        return Finding(False, found[0])
    if failures := [text for _, text in reports if text is not None]:
        return Finding(None, failures[0])
    if not any(texts for texts, _ in reports):
        return Finding(None, "no rank had anything to compare")
    return Finding(True)
