"""Chooses the prompts that the rounds of a run ask: those of the validation data, those of a file, or both."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from verl_valgen.prompts.datasets import prompts_from_dataset
from verl_valgen.prompts.files import OwnPrompt, tokenized
from verl_valgen.prompts.places import Place, places
from verl_valgen.records import Prompt
from verl_valgen.settings.checks import Mistakes
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import describe, printable

logger = logging.getLogger(__name__)

_MAX_LINES = 10
"""Prompts of a file that are told to be wrong, one a line."""


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
        rows: The rows of it to ask, by their places in it, in order; not read where the file's prompts replace them.
        template_kwargs: What the file's prompts pass to the chat template, as verl's data sets pass it.
        file_prompts: The prompts of the file `generation.prompts`, [] without one.
        end_ids: The tokens that end an answer.

    Raises:
        ConfigError: Prompts of the file cannot be rendered; with file and line of each.

    Raises what data set and chat template raise, where no row can be made a prompt.
    """
    mistakes = Mistakes()
    prompts = tokenized(file_prompts, tokenizer, template_kwargs, settings.turn, mistakes, end_ids)
    _raise_first(mistakes)
    if not (prompts and settings.prompts_mode == "replace"):
        may_be_none = bool(prompts)
        prompts = [*_validation_prompts(dataset, rows, tokenizer, settings, end_ids, may_be_none=may_be_none), *prompts]
    if not prompts:
        chosen = isinstance(settings.rows, str)
        which = f"first {settings.max_val_samples} validation rows" if chosen else "rows of generation.rows"
        logger.warning("no samples: none of the %s can be answered", which)
        return []
    if settings.reference == "ground_truth" and all(prompt.data.ground_truth is None for prompt in prompts):
        logger.warning("generation.reference=ground_truth: no row has a ground truth")
    if settings.params_key != GenerationSettings.params_key and all(prompt.data.params is None for prompt in prompts):
        logger.warning("generation.params_key: no row has anything in a column %s", printable(settings.params_key, 80))
    return prompts


def _raise_first(mistakes: Mistakes) -> None:
    if num_more := len(mistakes.lines[_MAX_LINES:]):
        mistakes.lines[_MAX_LINES:] = [f"generation.prompts: {num_more} more prompts cannot be rendered"]
    mistakes.raise_if_any()


def _validation_prompts(
    dataset: Any,
    rows: Sequence[int],
    tokenizer: Any,
    settings: GenerationSettings,
    end_ids: Collection[int],
    *,
    may_be_none: bool,
) -> list[Prompt]:
    """The prompts of the validation data, by their rows in its files, after a warning about rows that have none.

    Raises what data set and chat template raise where they do so for every row, unless there `may_be_none`.
    """
    refused: dict[int, Exception] = {}
    prompts, without_answer, multi_modal = prompts_from_dataset(
        dataset,
        rows,
        tokenizer,
        turn=settings.turn,
        params_key=settings.params_key,
        refused=refused,
        end_ids=end_ids,
    )
    if refused and len(refused) == len(set(rows)) and not may_be_none:
        raise next(iter(refused.values()))
    place_of = dict(zip(rows, places(dataset, rows), strict=True))
    reasons = {
        "have no answer left within data.max_length": without_answer,
        "have images or videos, and only text is generated from": multi_modal,
    }
    for row, error in refused.items():
        reasons.setdefault(f"cannot be made a prompt ({describe(error)})", []).append(row)
    for reason, skipped in reasons.items():
        if skipped:
            logger.warning(
                "rows %s of the validation data %s: skipped", _in_words(place_of[row] for row in skipped), reason
            )
    return [_at_its_place(prompt, place_of) for prompt in prompts]


def _at_its_place(prompt: Prompt, place_of: Mapping[int, Place]) -> Prompt:
    assert prompt.row is not None, "it comes from the data set"
    place = place_of[prompt.row]
    # Rows of several files may have the same number.
    return replace(prompt, row=place.row, file=place.file, stream=place.number)


def _in_words(skipped: Iterable[Place]) -> str:
    """The rows, after each file where there are several."""
    by_file: dict[str | None, list[int]] = {}
    for place in skipped:
        by_file.setdefault(place.file, []).append(place.row)
    return ", ".join(
        f"{rows}" if file is None else f"{rows} of {printable(file, 200)}" for file, rows in by_file.items()
    )
