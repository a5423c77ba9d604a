"""Which requests the prompts of a round become, and what becomes of the completions.

A prompt is asked under each strategy, `n` times where it is sampled. This module knows settings and records; it knows
neither models nor ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_valgen.prompts.columns import parameters
from verl_valgen.prompts.datasets import decode
from verl_valgen.records import DEFAULT_STRATEGY, Completion, Prompt, Request, Sample
from verl_valgen.settings import generation_config
from verl_valgen.settings.checks import ConfigError, plain
from verl_valgen.settings.load import GenerationSettings
from verl_valgen.text import printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One prompt under one strategy."""

    index: int
    """Place of the prompt in the round."""
    prompt: Prompt
    strategy: str
    params: Mapping[str, Any]
    """`transformers.GenerationConfig` fields that are in force."""
    num_completions: int
    best_of: int
    """Candidates of which each completion is chosen."""

    @property
    def in_force(self) -> dict[str, Any]:
        """The parameters as they are recorded."""
        return {**self.params, **({"best_of": self.best_of} if self.best_of > 1 else {})}

    def requests(self) -> list[Request]:
        """num_completions * best_of, the candidates of a completion next to each other."""
        stream = self.prompt.row if self.prompt.row is not None else self.prompt.stream
        return [
            Request(self.prompt.input_ids, (stream, number), self.params, wants_logprob=self.best_of > 1)
            for number in range(self.num_completions * self.best_of)
        ]

    def chosen(self, candidates: Sequence[Completion]) -> list[Completion]:
        """Of the answers to `requests`, num_completions: of equally likely ones the first."""
        return [
            max(candidates[start : start + self.best_of], key=_likelihood)
            for start in range(0, len(candidates), self.best_of)
        ]


def _likelihood(completion: Completion) -> float:
    logprob = completion.mean_logprob
    return -math.inf if logprob is None or math.isnan(logprob) else logprob  # NaN would stay the largest


def make_questions(
    prompts: Sequence[Prompt], settings: GenerationSettings, vocab_size: int | None = None
) -> list[Question]:
    """Strategy by strategy, within each in the order of the prompts.

    A prompt's own parameters go before the global ones, those of a strategy before both. Where they cannot be used, a
    warning says so, with the row, and the global ones stand.

    Raises:
        ConfigError: The global parameters, or those of a strategy, name tokens beyond the vocabulary.
    """
    of_all = _of_strategies(settings, "generation", vocab_size)
    of_prompts = [
        _with_own_parameters(index, prompt, settings, vocab_size) or of_all for index, prompt in enumerate(prompts)
    ]
    return [
        _question(index, prompt, name, of_strategies[name])
        for name in settings.strategies or (DEFAULT_STRATEGY,)
        for index, (prompt, of_strategies) in enumerate(zip(prompts, of_prompts, strict=True))
    ]


def answered(
    questions: Sequence[Question], completions: Sequence[Completion]
) -> Iterator[tuple[Question, int, Completion]]:
    """Each question with the number of a completion and the completion, of the answers to all requests in order.

    Prompt by prompt, within each in the order of the strategies.
    """
    start, found = 0, []
    for question in questions:
        end = start + question.num_completions * question.best_of
        found += [(question, number, one) for number, one in enumerate(question.chosen(completions[start:end]))]
        start = end
    yield from sorted(found, key=lambda item: item[0].index)  # stable


def _question(index: int, prompt: Prompt, strategy: str, settings: GenerationSettings) -> Question:
    # Without sampling the others would be the same.
    num_completions, best_of = (settings.n, settings.best_of) if settings.do_sample else (1, 1)
    return Question(index, prompt, strategy, settings.parameters, num_completions, best_of)


def with_global_parameters(question: Question, settings: GenerationSettings) -> Question:
    """The question without parameters of its prompt's own."""
    of_strategy = _of_strategies(settings, "generation")[question.strategy]
    return _question(question.index, question.prompt, question.strategy, of_strategy)


def _with_own_parameters(
    index: int, prompt: Prompt, settings: GenerationSettings, vocab_size: int | None
) -> dict[str, GenerationSettings] | None:
    """The settings of one prompt under each strategy; None where it has none of its own that can be used."""
    source = plain(settings.params_key)
    try:
        own = parameters(prompt.data.params)
        return _of_strategies(settings.overridden(own, source), source, vocab_size) if own else None
    except ConfigError as e:
        reason = str(e).replace("\n", "; ")
    except ValueError as e:
        reason = f"{source}: {e}"
    where = place(index, prompt)
    logger.warning("%s: %s; it is answered with the global parameters", where, printable(reason, 400))
    return None


def place(index: int, prompt: Prompt) -> str:
    """Where a prompt comes from, for warnings."""
    return f"row {prompt.row}" if prompt.row is not None else f"prompt {index + 1}"


def _of_strategies(
    settings: GenerationSettings, source: str, vocab_size: int | None = None
) -> dict[str, GenerationSettings]:
    found = {}
    for name, params in (settings.strategies or {DEFAULT_STRATEGY: {}}).items():
        of_strategy = f"{source}, under generation.strategies.{name}" if settings.strategies else source
        found[name] = settings.overridden(params, of_strategy)
        generation_config.check_token_ids(found[name].parameters, vocab_size, of_strategy)
    return found


def make_samples(
    questions: Sequence[Question], completions: Sequence[Completion], step: int, seed: int, dtype: str, tokenizer: Any
) -> list[Sample]:
    """The records of a round, without scores but those that the model gives, in the order of `answered`.

    What failed gives none.
    """
    return [
        Sample(
            step=step,
            index=question.index,
            row=prompt.row,
            strategy=question.strategy,
            completion=number,
            prompt=decode(tokenizer, prompt.input_ids, skip_special_tokens=False),
            prompt_text=prompt.text,
            generation=decode(tokenizer, completion.output_ids, skip_special_tokens=True),
            reference=prompt.reference,
            finish_reason=completion.finish_reason,
            num_prompt_tokens=len(prompt.input_ids),
            num_new_tokens=len(completion.output_ids),
            seed=seed,
            params={**question.in_force, "dtype": dtype},
            scores={} if completion.mean_logprob is None else {"mean_logprob": completion.mean_logprob},
            data_source=prompt.data.data_source,
            output_ids=completion.output_ids,
            ground_truth=prompt.data.ground_truth,
            extra_info=prompt.data.extra_info,
        )
        for question, number, completion in answered(questions, completions)
        if not completion.error
        for prompt in [question.prompt]
    ]
