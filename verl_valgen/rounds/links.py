"""Proves what is answered while training goes on, in two links.

When such answers are there the trainer's weights have moved on, and its forward pass, which is collective, cannot run
beside training. So the proof of verification.py is cut in two. Before training goes on, the model in training and the
copy, as it will generate, read the same texts, and their logits are compared: that finds a wrong copy. With the answers
the copy, without a cache and without padding, reads two of them: that finds a wrong way through it. This module decides
what is read; reading.py has the readers, comparing.py and judging.py the rules. (Over 200 lines, as neither link proves
anything without the other.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from verl_valgen.backends.comparing import closeness, dissimilarity, gaps
from verl_valgen.backends.hf import HFBackend
from verl_valgen.backends.judging import logprobs
from verl_valgen.backends.side_by_side import may_be_read_together, read_apart_from_now_on
from verl_valgen.collectives import attempt, broadcast
from verl_valgen.hosts.model_host import ModelHost, has_experts
from verl_valgen.records import Completion, Prompt, Request
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

_NUM_TEXTS = 2
_MAX_TOKENS = 2048
"""Of a text; its last ones."""
_MAX_READ = 64
"""Positions of a text that are compared, the last ones: those of the reference, or the end of the prompt."""


def texts_to_read(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompt and reference of the first rows, as token ids; the prompt alone where there is none. Never raises."""
    texts = []
    for prompt in list({id(prompt): prompt for prompt in prompts}.values())[:_NUM_TEXTS]:
        reference = prompt.reference_raw or prompt.reference or ""
        ids, error = attempt(lambda: tokenizer.encode(reference, add_special_tokens=False))  # noqa: B023  (at once)
        if error is not None:
            logger.debug("a reference could not be read: %s", describe(error))
        texts.append([*prompt.input_ids, *(ids or [])])
    return texts


# The first link


def first_link(reading: Reading, sequences: Sequence[Sequence[int]]) -> Finding:
    """Compares the copy with the model in training. Collective: all ranks must call, before training goes on.

    Where the model gives no logits, the mean log-probability of each text is compared with that of verl's own forward.

    Args:
        reading: `copy` is looked at on the logging rank alone; as it will generate, with its fused modules.
        sequences: Token ids of the texts, see `texts_to_read`; what other ranks than the logging rank pass is not
            looked at.

    Returns:
        The same on all ranks. Nothing is known (`verified` is None) where the comparison was not possible.
    """
    host = reading.host
    found, error = attempt(lambda: [[int(i) for i in ids][-_MAX_TOKENS:] for ids in sequences[:_NUM_TEXTS]])
    readable = [ids for ids in found or [] if len(ids) > 1]
    reason = "no row that could be read" if error is None else describe(error)
    may_be_together, _ = attempt(lambda: may_be_read_together(reading.copy, [len(ids) - 1 for ids in readable]))
    message = [readable, reason, len(readable) > 1 and may_be_together is True]
    received, reason, is_together = broadcast(message, host.is_logging_rank, host.device)
    texts = [_Text.of(ids) for ids in received]
    if not texts:
        return Finding(None, reason)
    if host.why_not_sharded() is not None:
        return _agreed(partial(_compared_logprobs, reading, texts), host)
    together = _agreed(partial(_compared_logits, reading, [texts]), host) if is_together else Finding(None)
    if together.verified:
        return together
    # A batch may be what the two readers take otherwise, or what there is no room for.
    alone = _agreed(partial(_compared_logits, reading, [[text] for text in texts]), host)
    if alone.verified and together.verified is False and host.is_logging_rank:
        read_apart_from_now_on(reading.copy)
    return together if alone.verified is None and together.verified is False else alone


def _agreed(compare: Callable[[], list[str | None]], host: ModelHost) -> Finding:
    """One finding of what all ranks' comparisons show. Collective: all ranks must call."""
    return agreed_finding(*attempt(compare), host.device)


class _Text(NamedTuple):
    """What is read of a text: the last token is only predicted."""

    input_ids: list[int]
    output_ids: list[int]

    @classmethod
    def of(cls, ids: list[int]) -> _Text:
        return cls(ids[:-1], ids[-min(_MAX_READ, len(ids) - 1) :])


def _value(value: Any, error: Exception | None) -> Any:
    """What `attempt` returned, or raises what it raised."""
    if error is not None:
        raise error
    return value


def _compared_logits(reading: Reading, batches: Sequence[Sequence[_Text]]) -> list[str | None]:
    """What the logits of the copy show, on the rank that has it; [] elsewhere. Collective: all ranks must call.

    Args:
        batches: The texts that are read in one pass each.

    Raises:
        MemoryError: On all ranks, where one has no room for the reading.
        Exception: On the rank concerned, after the last forward pass of the trainer's model.
    """
    host = reading.host
    arguments = [([text.input_ids for text in batch], [len(text.output_ids) for text in batch]) for batch in batches]
    with loaded(host):
        agree_on_memory(host, largest_reading_bytes(batches, host.model_config, host.compute_dtype))
        # What fails between two passes on one rank must not keep it from the next, in which the others wait for it.
        read = [attempt(partial(host.read, *of_batch)) for of_batch in arguments]
    expected = [_value(*outcome) for outcome in read]
    if not host.is_logging_rank:
        return []
    allowed = closeness((reading.dtype, host.compute_dtype), has_experts(reading.copy), host.device)

    def compare(of_batch: tuple[Any, ...], of_trainer: Sequence[Tensor]) -> str | None:
        of_copy = read_by_copy(reading.copy, *of_batch)
        found = [gaps(*pair) for pair in zip(of_trainer, of_copy, strict=True)]
        # The device is waited for once, when all is under way.
        of_texts = torch.cat(found).cpu().split([len(one) for one in found])
        logger.debug("the copy beside the trainer's model: logits differ by up to %.2g", max(map(torch.max, of_texts)))
        reasons = (dissimilarity(one, allowed) for one in of_texts)
        return next((f"the copy is not the trainer's model: {reason}" for reason in reasons if reason), None)

    return each(partial(compare, *pair) for pair in zip(arguments, expected, strict=True))


def _compared_logprobs(reading: Reading, texts: Sequence[_Text]) -> list[str | None]:
    """As `_compared_logits`, with verl's own forward, which gives log-probabilities alone, one text at a time."""
    host = reading.host
    batches = [[text] for text in texts]
    agree_on_memory(host, largest_reading_bytes(batches, host.model_config, host.compute_dtype))
    read = [attempt(partial(host.mean_logprob, *text)) for text in texts]
    of_trainer = [_value(*outcome) for outcome in read]
    if not host.is_logging_rank:
        return []

    def compare(text: _Text, expected: float | None) -> str | None:
        if expected is None:
            raise RuntimeError("verl's own forward pass of this trainer gives nothing to compare with")
        (logits,) = read_by_copy(reading.copy, [text.input_ids], [len(text.output_ids)])
        found = logprobs(logits, text.output_ids).mean().item()
        if abs(found - expected) <= MAX_LOGPROB_GAP or (found != found and expected != expected):
            return None
        return f"the copy gives a text a mean log-probability of {found:.2f}, the trainer's model {expected:.2f}"

    return each(partial(compare, *pair) for pair in zip(texts, of_trainer, strict=True))


# The second link


@torch.no_grad()
def second_link(reading: Reading, requests: Sequence[Request], completions: Sequence[Completion]) -> Finding:
    """Has the copy read two of its answers, without a cache and without padding. Not collective.

    For a thread beside training: it touches no switch of the process, no random state and nothing of the trainer's.
    What fails, for want of memory too, is a `Finding` without a verdict.

    Args:
        reading: `copy` is the one that has answered, with its own modules where the backend could restore them.
        requests: What was asked.
        completions: One for each request.
    """
    result, error = attempt(partial(_objections_to_answers, reading, requests, completions))
    if error is not None:
        return Finding(None, describe(error))
    if not result:
        return Finding(None, "no answer that could be read")
    return next((Finding(False, text) for text in result if text is not None), Finding(True))


def _objections_to_answers(
    reading: Reading, requests: Sequence[Request], completions: Sequence[Completion]
) -> list[str | None]:
    model: Any = reading.copy
    backend = HFBackend(model, reading.host.own_tokenizer, reading.seed)

    def judge(excerpt: Excerpt) -> str | None:
        (logits,) = read_by_copy(model, [excerpt.input_ids], [len(excerpt.output_ids)])
        processors, dtypes = backend.logits_processors(excerpt.request), (reading.dtype, reading.dtype)
        return objection_to(excerpt, logits, processors, reading.seed, dtypes, has_experts(model))

    chosen = chosen_excerpts(requests, completions, model.config)
    return each(partial(judge, Excerpt(requests[i], *fields)) for i, *fields in chosen)
