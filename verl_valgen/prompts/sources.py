"""Chooses the prompts that the rounds of a run ask: those of the validation data, those of a file, or both."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from verl_valgen.prompts.datasets import prompts_from_dataset
from verl_valgen.prompts.files import OwnPrompt, tokenized
from verl_valgen.records import Prompt
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import printable

logger = logging.getLogger(__name__)


def read_prompts(
    dataset: Any,
    rows: Sequence[int],
    tokenizer: Any,
    settings: GenerationSettings,
    template_kwargs: Mapping[str, Any],
    file_prompts: Sequence[OwnPrompt],
    *,
    end_ids: Collection[int] = (),
) -> list[Prompt]:
    """The prompts of all rounds; [] after a warning that says why there are none.

    A data set of somebody's own may draw random numbers as its items are read: the caller puts random states back.

    Args:
        dataset: The validation data set.
        rows: The rows of it to ask, in order; not read where the file's prompts replace them.
        template_kwargs: What the file's prompts pass to the chat template, as verl's data sets pass it.
        file_prompts: The prompts of the file `generation.prompts`, [] without one.
        end_ids: The tokens that end an answer.

    Raises whatever data set, tokenizer and chat template raise.
    """
    prompts = tokenized(file_prompts, tokenizer, template_kwargs, settings.turn, end_ids)
    if not (prompts and settings.prompts_mode == "replace"):
        prompts = [*_validation_prompts(dataset, rows, tokenizer, settings, end_ids), *prompts]
    if not prompts:
        logger.warning("no samples: none of the first %d validation rows can be answered", settings.max_val_samples)
        return []
    if settings.reference == "ground_truth" and all(prompt.data.ground_truth is None for prompt in prompts):
        logger.warning("generation.reference=ground_truth: no row has a ground truth")
    if settings.params_key != GenerationSettings.params_key and all(prompt.data.params is None for prompt in prompts):
        logger.warning("generation.params_key: no row has anything in a column %s", printable(settings.params_key, 80))
    return prompts


def _validation_prompts(
    dataset: Any, rows: Sequence[int], tokenizer: Any, settings: GenerationSettings, end_ids: Collection[int]
) -> list[Prompt]:
    """The prompts of the validation data, after a warning about rows that have none."""
    prompts, without_answer, multi_modal = prompts_from_dataset(
        dataset, rows, tokenizer, turn=settings.turn, params_key=settings.params_key, end_ids=end_ids
    )
    for skipped, reason in (
        (without_answer, "have no answer left within data.max_length"),
        (multi_modal, "have images or videos, and only text is generated from"),
    ):
        if skipped:
            logger.warning("rows %s of the validation data %s: skipped", skipped, reason)
    return prompts
