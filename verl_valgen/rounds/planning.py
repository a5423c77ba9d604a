"""Makes a round's plan: what the requests need on this model's devices, and what the settings allow.

needs.py estimates, plan.py decides; here both meet the trainer's model. Nothing is collective: all ranks come to the
same plan by the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from verl_valgen.backends import SHARDED, Way, backend_class
from verl_valgen.backends.base import Work
from verl_valgen.backends.lengths import longest_sequence, most_new_tokens
from verl_valgen.collectives import world_size
from verl_valgen.records import Request
from verl_valgen.rounds.needs import (
    ENGINE_AWAKE_BYTES,
    ENGINE_BYTES,
    engine_sequence_bytes,
    largest_sequence_bytes,
    logprobs_bytes,
    reading_bytes,
    rows_need,
)
from verl_valgen.rounds.plan import EngineNeeds, Needs, Plan, make_engine_plan, make_plan
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import OnceLogger

if TYPE_CHECKING:
    from verl_valgen.hosts.model_host import ModelHost

logger = logging.getLogger(__name__)


class Planner:
    """Plans the rounds of a run."""

    def __init__(self, host: ModelHost, settings: GenerationSettings) -> None:
        self.host, self.settings = host, settings
        self.warnings = OnceLogger(logger)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that answers are computed in: `generation.dtype`, else float32 on CPU and verl's compute dtype
        elsewhere."""
        if self.settings.dtype != "auto":
            return getattr(torch, self.settings.dtype)
        return torch.float32 if self.host.device.type == "cpu" else self.host.compute_dtype

    def plan(
        self,
        requests: Sequence[Request],
        free: float,
        way: Way,
        settings: GenerationSettings | None = None,
        *,
        ranks_per_kept_copy: int = 0,
    ) -> Plan:
        """The same on all ranks, or the same exception.

        Args:
            free: Bytes that are free on every rank.
            settings: In place of those of the run.
            ranks_per_kept_copy: Of the way's engine, where it is there already, and sleeps; see `Loader`.

        Raises:
            MemoryError: The round does not fit.
            ValueError: The settings ask for what cannot be.
        """
        settings = settings or self.settings
        plan = (
            self._of_engine(requests, free, ranks_per_kept_copy)
            if way.is_engine
            else self._plan(requests, free, way, settings)
        )
        logger.debug("%s for %d prompts; %.1f GiB are free", plan, len(requests), free / 2**30)
        return plan

    def beside_training(
        self, requests: Sequence[Request], free: Sequence[tuple[float, float]], logging_rank: int, way: Way
    ) -> Plan | None:
        """The plan with which the logging rank answers alone; None where that does not fit beside training.

        Args:
            free: The bytes that are free on each rank now, and beside training.
        """
        _, beside_training = free[logging_rank]
        least = max(0, min(beside_training, *(now for now, _ in free)) - self._reading_bytes(requests))
        try:
            if (reason := _why_not_beside_training(requests)) is not None:
                raise ValueError(reason)
            return self.plan(requests, least, way, replace(self.settings, gather="copy", ranks=1))
        except (MemoryError, ValueError) as e:
            if self.host.is_logging_rank:
                self.warn_of_waiting(f"beside training {e}" if isinstance(e, MemoryError) else str(e))
            return None

    def warn_of_waiting(self, reason: str) -> None:
        self.warnings.warn(f"generation.overlap: training waits for the answers: {reason}")

    def why_not_sharded(self, requests: Sequence[Request]) -> str | None:
        """Why these requests, the same on all ranks, cannot be answered without a copy; None where they can."""
        return self.host.why_not_sharded() or _why_not_in_step(requests)

    def work(self, way: Way, plan: Plan, requests: Sequence[Request], share: Sequence[Request]) -> Work:
        """What a loader is told of a round's plan."""
        sequence = self._engine_sequence_bytes(requests)[plan.ranks_per_copy] if way.is_engine else 0
        return Work(
            requests=requests,
            share=share,
            dtype=self.dtype,
            batch_size=plan.batch_size,
            ranks_per_copy=plan.ranks_per_copy,
            cache_bytes=(plan.batch_size + 1) * sequence,  # vLLM keeps a block for itself
            compile=self.settings.compile,
        )

    def sequence_bytes(self, requests: Sequence[Request]) -> int:
        """`needs.largest_sequence_bytes` with this model."""
        return largest_sequence_bytes(requests, self.host.model_config.get_text_config(), self.dtype)

    def logprobs_bytes(self, requests: Sequence[Request]) -> int:
        """`needs.logprobs_bytes` with this model."""
        return logprobs_bytes(requests, self.host.model_config.get_text_config(), self.dtype)

    def _plan(self, requests: Sequence[Request], free: float, way: Way, settings: GenerationSettings) -> Plan:
        host = self.host
        gather = "sharded" if way is SHARDED else settings.gather
        row, prompts = self._rows_need(requests, way)
        plan = make_plan(
            len(requests),
            Needs(
                copy=host.num_parameters * self.dtype.itemsize,
                unit=host.largest_unit_bytes,
                sequence=self.sequence_bytes(requests),
                logprobs=self.logprobs_bytes(requests),
                row=row,
                prompts=prompts,
            ),
            free,
            world_size(),
            gather=gather,
            ranks=settings.ranks,
            batch_size=settings.batch_size,
            why_not_sharded=self.why_not_sharded(requests),
        )
        if plan.is_sharded and gather == "auto" and host.is_logging_rank:
            self.warnings.warn(
                "no device has room for a copy of the model: the answers come through the sharded model, which gathers "
                "every layer for every token (with generation.backend=vllm several devices hold a copy together)"
            )
        return plan

    def _of_engine(self, requests: Sequence[Request], free: float, ranks_per_kept_copy: int) -> Plan:
        host = self.host
        needs = EngineNeeds(
            weights=host.num_parameters * self.dtype.itemsize,
            unit=host.largest_unit_bytes,
            sequence=self._engine_sequence_bytes(requests),
            fixed=ENGINE_BYTES,
            fixed_if_kept=ENGINE_AWAKE_BYTES,
        )
        return make_engine_plan(
            len(requests),
            needs,
            free,
            world_size(),
            tensor_parallel=self.settings.tensor_parallel,
            ranks=self.settings.ranks,
            batch_size=self.settings.batch_size,
            ranks_per_kept_copy=ranks_per_kept_copy,
        )

    def _engine_sequence_bytes(self, requests: Sequence[Request]) -> dict[int, int]:
        return engine_sequence_bytes(requests, self.host.model_config, self.dtype, world_size())

    def _rows_need(self, requests: Sequence[Request], way: Way) -> tuple[int | None, int]:
        """What a row takes, and what is read at once to fill some; None and 0 where a copy answers in batches."""
        if way is SHARDED or not backend_class(way.backend, self.host.device.type).refills_rows(requests):
            return None, 0
        return rows_need(requests, self.host.model_config.get_text_config(), self.dtype)

    def _reading_bytes(self, requests: Sequence[Request]) -> int:
        """What it takes that the copy reads the longest answer, if any is to be read."""
        if self.settings.verify is False:
            return 0
        config = self.host.model_config.get_text_config()
        most_new = max(most_new_tokens(request, config) for request in requests)
        return reading_bytes(config, longest_sequence(requests, config), most_new, self.dtype)


def _why_not_beside_training(requests: Sequence[Request]) -> str | None:
    """Why what transformers does with these requests would reach into the process."""
    for name in ("cache_implementation", "prefill_chunk_size"):  # the latter sets a switch of torch's compiler
        if any(request.params.get(name) for request in requests):
            return f"transformers may compile and capture what runs with generation.{name}"
    return None


def _why_not_in_step(requests: Sequence[Request]) -> str | None:
    """Why ranks with different requests could not go through the sharded model in step."""
    for name, neutral in (("guidance_scale", 1.0), ("prefill_chunk_size", None)):
        if any(request.params.get(name, neutral) not in (neutral, None) for request in requests):
            return f"with generation.{name} the number of forward passes differs from rank to rank"
    return None
