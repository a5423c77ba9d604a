"""From prompts to requests, and from completions to answers and samples.

A prompt is asked under each strategy, `n` times where it is sampled. Completions are paired with their queries here and
nowhere else. This module knows settings and records; it knows neither models nor ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from verl_valgen.backends import check_parameters
from verl_valgen.prompts.answers import AnswerReader
from verl_valgen.prompts.columns import parameters
from verl_valgen.records import DEFAULT_STRATEGY, Answer, Completion, Prompt, Query, Request, Sample, origin
from verl_valgen.settings import generation_config
from verl_valgen.settings.checks import ConfigError, plain
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import printable

logger = logging.getLogger(__name__)


def make_queries(prompts: Sequence[Prompt], settings: GenerationSettings, vocab_size: int | None = None) -> list[Query]:
    """Queries strategy by strategy, within each in the order of the prompts.

    Precedence: a strategy's parameters > the row's > the global ones. Where a row's cannot be used, a warning says so,
    with the row, and the global ones stand.

    Raises:
        ConfigError: The global parameters, or those of a strategy, name tokens beyond the vocabulary.
    """
    shared = _by_strategy(settings, "generation", vocab_size)
    by_prompt = [
        _with_row_parameters(index, prompt, settings, vocab_size) or shared for index, prompt in enumerate(prompts)
    ]
    return [
        _query(index, prompt, name, by_strategy[name])
        for name in settings.strategies or (DEFAULT_STRATEGY,)
        for index, (prompt, by_strategy) in enumerate(zip(prompts, by_prompt, strict=True))
    ]


def make_requests(queries: Sequence[Query]) -> list[Request]:
    """The requests of all queries, in order: num_completions * best_of each, a completion's candidates side by side."""
    requests = []
    for query in queries:
        stream = query.prompt.stream if query.prompt.stream is not None else query.prompt.row or 0
        requests += [
            Request(query.prompt.input_ids, (stream, number), query.params, wants_logprob=query.best_of > 1)
            for number in range(query.num_completions * query.best_of)
        ]
    return requests


def pair(queries: Sequence[Query], completions: Sequence[Completion]) -> list[Answer]:
    """The answers prompt by prompt, within each in the order of the strategies.

    Args:
        completions: The answers to `make_requests(queries)`, in order. Of the candidates of a completion the likeliest
            is kept, of equally likely ones the first.
    """
    num_requests = sum(query.num_completions * query.best_of for query in queries)
    assert len(completions) == num_requests, "there is one completion per request"
    answers = []
    remaining = iter(completions)
    for query in queries:
        for number in range(query.num_completions):
            candidates = [next(remaining) for _ in range(query.best_of)]
            answers.append(Answer(query, number, max(candidates, key=_likelihood)))
    return sorted(answers, key=lambda answer: answer.query.index)  # stable


def _likelihood(completion: Completion) -> float:
    logprob = completion.mean_logprob
    return -math.inf if logprob is None or math.isnan(logprob) else logprob  # NaN would stay the largest


def _query(index: int, prompt: Prompt, strategy: str, settings: GenerationSettings) -> Query:
    # Without sampling all completions would be the same.
    num_completions, best_of = (settings.n, settings.best_of) if settings.do_sample else (1, 1)
    return Query(index, prompt, strategy, settings.parameters, num_completions, best_of)


def with_global_parameters(query: Query, settings: GenerationSettings) -> Query:
    """The query without the parameters of its row."""
    return _query(query.index, query.prompt, query.strategy, _by_strategy(settings, "generation")[query.strategy])


def _with_row_parameters(
    index: int, prompt: Prompt, settings: GenerationSettings, vocab_size: int | None
) -> dict[str, GenerationSettings] | None:
    """The settings of one prompt by strategy; None where its row has no parameters that can be used."""
    source = plain(settings.params_key)
    try:
        row_parameters = parameters(prompt.data.params)
        if not row_parameters:
            return None
        return _by_strategy(settings.overridden(row_parameters, source), source, vocab_size)
    except ConfigError as e:
        reason = str(e).replace("\n", "; ")
    except ValueError as e:
        reason = f"{source}: {e}"
    logger.warning(
        "%s: %s; it is answered with the global parameters",
        printable(origin(prompt) or f"prompt {index + 1}", 300),
        printable(reason, 400),
    )
    return None


def _by_strategy(
    settings: GenerationSettings, source: str, vocab_size: int | None = None
) -> dict[str, GenerationSettings]:
    by_strategy = {}
    for name, params in (settings.strategies or {DEFAULT_STRATEGY: {}}).items():
        full_source = f"{source}, under generation.strategies.{name}" if settings.strategies else source
        by_strategy[name] = settings.overridden(params, full_source)
        generation_config.check_token_ids(by_strategy[name].parameters, vocab_size, full_source)
        check_parameters(settings.backend, by_strategy[name].parameters, full_source)
    return by_strategy


def make_samples(
    answers: Sequence[Answer], step: int, seed: int, dtype: str, reader: AnswerReader, verified: bool | None
) -> list[Sample]:
    """The records of a round, in the order of the answers, with no scores but the model's own; none for failures."""
    samples = [_sample(answer, step, seed, dtype, reader) for answer in answers if not answer.completion.error]
    return [replace(s, verified=verified, scores={} if verified is False else s.scores) for s in samples]


def _sample(answer: Answer, step: int, seed: int, dtype: str, reader: AnswerReader) -> Sample:
    query, completion = answer.query, answer.completion
    prompt = query.prompt
    said, expected = reader.answer(prompt.input_ids, completion), reader.reference(prompt)
    best_of = {"best_of": query.best_of} if query.best_of > 1 else {}
    return Sample(
        step=step,
        index=query.index,
        row=prompt.row,
        origin=", ".join(filter(None, [origin(prompt), prompt.not_shown])) or None,
        strategy=query.strategy,
        completion=answer.number,
        prompt=reader.prompt(prompt),
        prompt_text=prompt.text,
        generation=said.generation,
        generation_raw=said.raw,
        reference=expected.reference,
        reference_raw=expected.raw,
        reference_text=prompt.reference_text,
        finish_reason=completion.finish_reason,
        num_prompt_tokens=len(prompt.input_ids),
        num_new_tokens=len(completion.output_ids),
        seed=seed,
        params={**query.params, **best_of, "dtype": dtype},
        scores={} if completion.mean_logprob is None else {"mean_logprob": completion.mean_logprob},
        data_source=prompt.data.data_source,
        ground_truth=prompt.data.ground_truth,
        output_ids=completion.output_ids,
        whole_generation=said.whole,
        extra_info=prompt.data.extra_info,
        file=prompt.file,
    )
