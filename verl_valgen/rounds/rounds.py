"""Rounds of generation: when they take place, and how one goes from the gather to the record.

All ranks take part in a round; it ends with samples in the trackers on the logging rank (`recorder.py`). Whatever fails
costs a warning: `run` catches what answering raises.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from verl_valgen.collectives import broadcast
from verl_valgen.hosts.base import Host
from verl_valgen.prompts.datasets import mask_is_shifted
from verl_valgen.prompts.files import OwnPrompt
from verl_valgen.prompts.masks import prompts_from_batch
from verl_valgen.records import Prompt, Query
from verl_valgen.rounds.generation import GatheredRound
from verl_valgen.rounds.preparation import prepare, vocab_size
from verl_valgen.rounds.proven import ProvenAnswerer
from verl_valgen.rounds.queries import make_queries, make_requests, pair
from verl_valgen.rounds.recorder import GOES_ON, Recorder
from verl_valgen.rounds.restore import preserved_random_state
from verl_valgen.rounds.wording import Wording
from verl_valgen.settings.checks import ConfigError
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import OnceLogger

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenRound:
    """A round between its beginning, when the weights are gathered, and its end, when the answers are recorded."""

    step: int
    started_at: float
    """`time.time()`"""
    queries: Sequence[Query]
    """The queries that were asked, on the logging rank: their parameters may be given up before this round ends."""
    gathered: GatheredRound | None


class ValidationRounds:
    """The rounds of one trainer; as a context manager around its `fit()`.

    Args:
        file_prompts: The prompts of the file that `generation.prompts` names.
    """

    def __init__(self, host: Host, settings: GenerationSettings, file_prompts: Sequence[OwnPrompt] = ()) -> None:
        self.host, self.settings, self.file_prompts = host, settings, file_prompts
        self.wording = Wording(host, settings)
        self.answerer = ProvenAnswerer(host, settings, self.wording.special_tokens)
        self.recorder: Recorder | None = None
        """The logging rank's alone, while `fit()` runs."""
        self.steps: list[int] = []
        """The steps of the rounds, as far as they are known in advance; on all ranks."""
        self.asked_at: set[int] = set()
        """The steps of the rounds that took place, whether they gave samples or not."""
        self.warnings = OnceLogger(logger)
        self.stack = ExitStack()

    def __enter__(self) -> None:
        """Prepares the rounds, and hooks them into validation. Collective: all ranks must call."""
        if self._prepare():
            self.stack.enter_context(self.host.hooked(self.run, before_train=self.settings.before_train))

    def __exit__(self, *exc_info: object) -> None:
        with self.stack:  # verl's runs are open until it is closed
            if self.recorder is not None:
                self.recorder.close()
                self.recorder = None  # another `fit()` has runs of its own

    @contextmanager
    def told_if_missing(self) -> Iterator[None]:
        """At the end of `fit()`, unless it raises, the logging rank says which announced rounds did not come."""
        yield
        missing = [str(step) for step in self.steps if step not in self.asked_at]
        if missing and self.host.is_logging_rank:
            steps = ", ".join([*missing[:3], "...", missing[-1]] if len(missing) > 4 else missing)
            self.warnings.warn(
                f"no samples came at these steps, for which they were announced: {steps}; training ended "
                f"without validating there (last step with samples: {max(self.asked_at, default='none')})"
            )

    def _prepare(self) -> bool:
        """Says on the logging rank when samples will come, or why none will. Collective: all ranks must call.

        Returns:
            Whether there will be any, the same on all ranks.

        Raises:
            ConfigError: On all ranks: the data and the model show that the configuration is wrong.
        """
        if not self.settings.enabled:
            if self.host.is_logging_rank:
                logger.info("no samples: generation is not configured, or switched off")
            return False
        steps: list[int] | None = None
        mistake: str | None = None
        if self.host.is_logging_rank:
            try:
                self.recorder, steps = prepare(self.host, self.settings, self.file_prompts, self.wording, self.warnings)
            except ConfigError as e:
                mistake = str(e)
            except Exception as e:
                self.warnings.warn_of_error(
                    "the prompts could not be prepared, so there will be no samples", e, GOES_ON
                )
        received, mistake = broadcast([steps, mistake], self.host.is_logging_rank, self.host.device)
        if mistake is not None:
            raise ConfigError(mistake)
        self.steps, self.asked_at = received or [], set()
        return received is not None

    def run(self, step: int) -> None:
        """One round, if it is time for one; never raises. Collective: all ranks must call."""
        if self.settings.every > 1 and step not in self.steps:
            return
        self.asked_at.add(step)
        try:
            self.end(self.begin(step))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a panic of what is written in Rust is no Exception
            out_of_memory = isinstance(e, torch.OutOfMemoryError | MemoryError)
            advice = ["lower generation.max_new_tokens, or set generation.gather=sharded"] if out_of_memory else []
            self.warnings.warn_of_error("no samples at this validation", e, *advice, GOES_ON)

    def begin(self, step: int) -> OpenRound:
        """Gathers the weights of this moment for a round. Collective: all ranks must call.

        Raises:
            Exception: On the logging rank alone, after the last collective.
        """
        started_at = time.time()
        queries = [] if self.recorder is None else self.recorder.queries
        with preserved_random_state(self.host.device):
            return OpenRound(step, started_at, queries, self.answerer.begin(make_requests(queries)))

    def end(self, round: OpenRound) -> None:
        """Answers with the gathered weights and records. Collective: all ranks must call.

        Raises:
            Exception: On the logging rank alone, after the last collective.
        """
        with preserved_random_state(self.host.device):
            answers = self.answerer.finish(round.gathered)
            if self.recorder is not None and answers is not None:
                self.recorder.record(round.queries, answers, round.step, time.time() - round.started_at)

    def generate_samples(self, batch: Any) -> tuple[list[str], list[str]]:
        """See `ValidationGenerationMixin.generate_samples`. Collective: all ranks must call."""
        prompts: list[Prompt] = []
        queries: list[Query] = []
        error: Exception | None = None
        with preserved_random_state(self.host.device):
            if self.host.is_logging_rank:
                try:
                    prompts = self._prompts_in(batch)
                    queries = make_queries(prompts, replace(self.settings, n=1, strategies={}), vocab_size(self.host))
                except Exception as e:  # the other ranks wait for a word
                    error = e
            proven = self.answerer(None if error else make_requests(queries))
        if error is not None:
            raise error
        if proven is None:
            return [], []
        if proven.verified is False:
            raise RuntimeError("the answers failed the check against the trainer's model")
        answers = [answer.completion for answer in pair(queries, proven.completions)]
        for answer in answers:
            if answer.error:
                raise RuntimeError(answer.error)
        reader = self.wording.reader
        return (
            [reader.prompt(prompt) for prompt in prompts],
            [
                reader.answer(prompt.input_ids, answer).generation
                for prompt, answer in zip(prompts, answers, strict=True)
            ],
        )

    def _prompts_in(self, batch: Any) -> list[Prompt]:
        is_shifted, end_ids = mask_is_shifted(self.host.val_dataset), self.wording.end_ids
        in_batch = prompts_from_batch(batch, self.host.tokenizer, shifted=is_shifted, end_ids=end_ids)
        prompts = [replace(prompt, stream=i) for i, prompt in enumerate(p for p in in_batch if p is not None)]
        if len(prompts) < len(in_batch):
            self.warnings.warn(
                f"{len(in_batch) - len(prompts)} of the batch's {len(in_batch)} samples have images or videos, and "
                "only text is generated from: left out"
            )
        return prompts
