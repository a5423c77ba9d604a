"""Rounds of generation: which prompts, when, and what becomes of the answers (`answering.py` makes them).

All ranks take part in a round; it ends with samples in the trackers on the logging rank. Whatever fails costs a
warning: `run` catches what answering raises, the trackers see to themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from verl_valgen.answering import Answering
from verl_valgen.config import GenerationSettings
from verl_valgen.exchange import agree
from verl_valgen.hosts.base import Host
from verl_valgen.prompts import decode, mask_is_shifted, prompts_from_batch, prompts_from_dataset
from verl_valgen.random_state import preserved_random_state
from verl_valgen.samples import Completion, Prompt, Request, Sample
from verl_valgen.text import describe, describe_at_length
from verl_valgen.trackers import open_trackers
from verl_valgen.trackers.composite import CompositeTracker
from verl_valgen.trackers.jsonl import set_aside

logger = logging.getLogger(__name__)


class ValidationRounds:
    """The rounds of one trainer; as a context manager around its `fit()`."""

    def __init__(self, host: Host, settings: GenerationSettings) -> None:
        self.host, self.settings = host, settings
        self.answer = Answering(host, settings)
        self.prompts: list[Prompt] = []
        """Answered at every round; on the logging rank alone."""
        self.trackers: CompositeTracker | None = None
        self.warned: set[str] = set()
        self.stack = ExitStack()

    @property
    def directory(self) -> Path:
        return Path(self.host.config.trainer.default_local_dir) / "generations"

    def __enter__(self) -> None:
        """Collective: all ranks must call."""
        if self._prepare():
            self.stack.enter_context(self.host.after_each_validation(self.run))

    def __exit__(self, *exc_info: object) -> None:
        self.stack.close()
        if self.trackers is not None:
            self.trackers.close()
            self.trackers = None  # another `fit()` has runs of its own

    def _prepare(self) -> bool:
        """Says on the logging rank when samples will come, or why none will. Collective: all ranks must call.

        Returns:
            Whether there will be any, the same on all ranks.
        """
        if not self.settings.enabled:
            if self.host.is_logging_rank:
                logger.info("no samples: generation is not configured, or switched off")
            return False
        if self.host.is_logging_rank:
            try:
                prompts, schedule = self._read_prompts(), self.host.schedule()
                if prompts:
                    logger.info("%d samples %s, in %s", len(prompts), schedule, self.directory)
                    self._set_earlier_samples_aside(schedule.start_step)
                self.prompts = prompts
            except Exception as e:
                self._warn("the validation prompts could not be read, so there will be no samples", e)
        return agree(bool(self.prompts) or not self.host.is_logging_rank, self.host.device)

    def _read_prompts(self) -> list[Prompt]:
        """The prompts of all rounds; [] after a warning that says why there are none."""
        host = self.host
        if (reason := host.why_no_validation_batch()) is not None:
            logger.warning("no samples: %s", reason)
            return []
        model_class: Any = host.model_class
        if not (hasattr(model_class, "generate") and model_class.can_generate()):
            logger.warning("no samples: the model class %s has no `generate`", model_class.__name__)
            return []
        with preserved_random_state(host.device):
            rows = host.validation_rows(self.settings.max_val_samples)
            found = prompts_from_dataset(host.val_dataset, rows, host.tokenizer)
        for skipped, reason in (
            (found.without_answer, "have no answer left within data.max_length"),
            (found.multi_modal, "have images or videos, and only text is generated from"),
        ):
            if skipped:
                logger.warning("rows %s of the validation data %s: skipped", skipped, reason)
        if not found.prompts:
            logger.warning("no samples: none of the first %d validation rows can be answered", len(rows))
        return found.prompts

    def _set_earlier_samples_aside(self, start_step: int) -> None:
        try:
            folder = set_aside(self.directory, start_step)
        except OSError as e:
            self._warn(f"samples of an earlier run stay in {self.directory}", e)
        else:
            if folder is not None:
                logger.info("samples of an earlier run beyond step %d were moved to %s", start_step, folder)

    def run(self, step: int) -> None:
        """One round; never raises. Collective: all ranks must call."""
        try:
            with preserved_random_state(self.host.device):
                completions = self.answer(_requests(self.prompts))
                if completions is not None:
                    self._log(self._samples(completions, step), step)
        except Exception as e:
            out_of_memory = isinstance(e, torch.OutOfMemoryError | MemoryError)
            advice = "lower generation.max_new_tokens, or set generation.gather=sharded" if out_of_memory else ""
            self._warn("no samples at this validation", e, advice)

    def generate_samples(self, batch: Any) -> tuple[list[str], list[str]]:
        """See `ValidationGenerationMixin.generate_samples`. Collective: all ranks must call."""
        tokenizer = self.host.tokenizer
        prompts: list[Prompt] | None = None
        error: Exception | None = None
        with preserved_random_state(self.host.device):
            if self.host.is_logging_rank:
                try:
                    prompts = self._prompts_of(batch)
                except Exception as e:  # the others have to hear of it
                    error = e
            completions = self.answer(None if prompts is None else _requests(prompts))
        if error is not None:
            raise error
        if prompts is None or completions is None:
            return [], []
        return (
            [decode(tokenizer, prompt.input_ids, skip_special_tokens=False) for prompt in prompts],
            [decode(tokenizer, completion.output_ids, skip_special_tokens=True) for completion in completions],
        )

    def _prompts_of(self, batch: Any) -> list[Prompt]:
        in_batch = prompts_from_batch(batch, self.host.tokenizer, shifted=mask_is_shifted(self.host.val_dataset))
        prompts = [prompt for prompt in in_batch if prompt is not None]
        if len(prompts) < len(in_batch):
            self._warn_once(
                f"{len(in_batch) - len(prompts)} of the batch's {len(in_batch)} samples have images or videos, and "
                "only text is generated from: left out"
            )
        return prompts

    def _samples(self, completions: Sequence[Completion], step: int) -> list[Sample]:
        tokenizer, settings = self.host.tokenizer, self.settings
        params = settings.parameters | {"dtype": str(self.answer.computed_in).removeprefix("torch.")}
        return [
            Sample(
                step=step,
                index=index,
                row=prompt.row,
                strategy="default",
                completion=0,
                prompt=decode(tokenizer, prompt.input_ids, skip_special_tokens=False),
                prompt_text=prompt.text,
                generation=decode(tokenizer, completion.output_ids, skip_special_tokens=True),
                reference=prompt.reference,
                finish_reason=completion.finish_reason,
                num_prompt_tokens=len(prompt.input_ids),
                num_new_tokens=len(completion.output_ids),
                seed=settings.seed,
                params=params,
            )
            for index, (prompt, completion) in enumerate(zip(self.prompts, completions, strict=True))
        ]

    def _log(self, samples: Sequence[Sample], step: int) -> None:
        if self.trackers is None:  # verl opens its runs inside `fit()`
            loggers = self.host.config.trainer.logger
            self.trackers = open_trackers(
                [loggers] if isinstance(loggers, str) else list(loggers),
                directory=self.directory,
                max_log_chars=self.settings.max_log_chars,
                max_tracker_chars=self.settings.max_tracker_chars,
            )
        self.trackers.log_samples(samples, step)

    def _warn_once(self, message: str, cause: str = "") -> None:
        cause = cause or message
        if cause not in self.warned:
            self.warned.add(cause)
            logger.warning("%s", message)

    def _warn(self, what: str, error: Exception, advice: str = "") -> None:
        """Warns once per cause; the traceback and repetitions are for DEBUG."""
        cause = describe(error)
        self._warn_once(f"{what}: {cause}{f'; {advice}' if advice else ''}; training goes on", cause)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s\n%s", what, describe_at_length(error))


def _requests(prompts: Sequence[Prompt]) -> list[Request]:
    return [
        Request(prompt.input_ids, key=(index if prompt.row is None else prompt.row, 0))
        for index, prompt in enumerate(prompts)
    ]
