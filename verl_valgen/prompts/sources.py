"""Which prompts the rounds of a run ask: those of the validation data, those of a file, or both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from verl_valgen.hosts.base import Host
from verl_valgen.prompts.datasets import prompts_from_dataset
from verl_valgen.prompts.files import OwnPrompt, tokenized
from verl_valgen.records import Prompt
from verl_valgen.rounds.restore import preserved_random_state
from verl_valgen.settings.load import GenerationSettings
from verl_valgen.text import printable

logger = logging.getLogger(__name__)


def read_prompts(host: Host, settings: GenerationSettings, file_prompts: Sequence[OwnPrompt] = ()) -> list[Prompt]:
    """The prompts of all rounds; [] after a warning that says why there are none.

    Args:
        file_prompts: Those of the file that `generation.prompts` names.

    Raises whatever data set, file, tokenizer and chat template raise.
    """
    if (reason := host.why_no_validation_batch()) is not None:  # own prompts are asked where validation runs
        logger.warning("no samples: %s", reason)
        return []
    model_class: Any = host.model_class
    if not (hasattr(model_class, "generate") and model_class.can_generate()):
        logger.warning("no samples: the model class %s has no `generate`", model_class.__name__)
        return []
    own = tokenized(file_prompts, host.tokenizer, host.chat_template_kwargs, settings.turn) if file_prompts else []
    replaced = bool(own) and settings.prompts_mode == "replace"
    prompts = own if replaced else [*_validation_prompts(host, settings), *own]
    if not prompts:
        logger.warning("no samples: none of the first %d validation rows can be answered", settings.max_val_samples)
    elif settings.params_key != GenerationSettings.params_key and all(prompt.data.params is None for prompt in prompts):
        logger.warning("generation.params_key: no row has anything in a column %s", printable(settings.params_key, 80))
    return prompts


def _validation_prompts(host: Host, settings: GenerationSettings) -> list[Prompt]:
    with preserved_random_state(host.device):
        rows = host.validation_rows(settings.max_val_samples)
        found = prompts_from_dataset(
            host.val_dataset, rows, host.tokenizer, turn=settings.turn, params_key=settings.params_key
        )
    for skipped, reason in (
        (found.without_answer, "have no answer left within data.max_length"),
        (found.multi_modal, "have images or videos, and only text is generated from"),
    ):
        if skipped:
            logger.warning("rows %s of the validation data %s: skipped", skipped, reason)
    return found.prompts
