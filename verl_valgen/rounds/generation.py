"""From requests on the logging rank to completions there, with whatever ranks, memory and time it takes.

This module knows how ranks share the work. It knows neither data sets nor trackers.
"""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import astuple
from typing import Any

import torch
from transformers import GenerationConfig

from verl_valgen.backends import backend_class
from verl_valgen.backends.base import Backend, Limits
from verl_valgen.collectives import broadcast, gather_values, rank, world_size
from verl_valgen.hosts.base import Host
from verl_valgen.records import Completion, Request, pack, unpack
from verl_valgen.rounds.plan import Needs, Plan, free_bytes, largest_sequence_bytes, logprobs_bytes, make_plan, shares
from verl_valgen.rounds.restore import preserved_blas_workspaces
from verl_valgen.settings.generation_config import special_tokens
from verl_valgen.settings.load import GenerationSettings
from verl_valgen.text import as_exception, describe, describe_at_length

logger = logging.getLogger(__name__)


class OtherRankError(RuntimeError):
    """Another rank failed; the message says how."""


class Answering:
    """Answers requests with the weights as they are now."""

    def __init__(self, host: Host, settings: GenerationSettings) -> None:
        self.host, self.settings = host, settings
        self.has_warned = False
        self.computed_in = self.dtype
        """The dtype of the last answers; through the sharded model it is the trainer's own."""

    @property
    def dtype(self) -> torch.dtype:
        """That is computed in, by the plain copy."""
        if self.settings.dtype != "auto":
            return getattr(torch, self.settings.dtype)
        return torch.float32 if self.host.device.type == "cpu" else self.host.compute_dtype

    def __call__(self, requests: Sequence[Request] | None) -> list[Completion] | None:
        """Collective: all ranks must call.

        Args:
            requests: On the logging rank; None there if there are none to be had, which ends the call on all ranks.
                What the other ranks pass is not looked at.

        Returns:
            One completion per request, in their order, on the logging rank; None elsewhere.

        Raises:
            Exception: On the logging rank alone, after the last collective: what failed there, or `OtherRankError` for
                what failed elsewhere.
        """
        host = self.host
        limit = self.settings.max_round_time_s
        deadline = time.time() + limit if limit else math.inf
        packed, error = None, None
        try:
            packed = None if requests is None else pack(requests)
        except Exception as e:  # the others wait for a word
            error = e
        logging_rank, received = broadcast([rank(), packed], host.is_logging_rank, host.device) or (rank(), None)
        if error is not None:
            raise error
        all_requests = [] if received is None else unpack(received)
        if not all_requests:
            return [] if host.is_logging_rank else None
        with preserved_blas_workspaces(host.device), ExitStack() as moved:
            free = self._on_all_ranks(lambda: self._prepare(moved))
            if free is None:
                return None
            try:
                plan = self._plan(all_requests, min(free))
            except Exception:  # on all ranks alike
                if host.is_logging_rank:
                    raise
                return None
            self.computed_in = host.compute_dtype if plan.is_sharded else self.dtype
            # The logging rank is the first to be given a share.
            place = (rank() - logging_rank) % world_size()
            of_ranks = shares(len(all_requests), plan.num_ranks)
            share = [all_requests[i] for i in of_ranks[place]] if place < plan.num_ranks else []
            answer = self._through_the_sharded_model if plan.is_sharded else self._with_a_copy
            found = self._on_all_ranks(
                lambda: answer(share, plan, deadline, moved), only_logging_rank=plan.num_ranks == 1
            )
        if found is None or not host.is_logging_rank:
            return None
        in_order = [found[(logging_rank + place) % len(found)] for place in range(plan.num_ranks)]
        return [Completion(*fields) for completions in in_order for fields in completions]

    def _on_all_ranks(self, function: Callable[[], Any], *, only_logging_rank: bool = False) -> list[Any] | None:
        """What a function gives on each rank, as JSON makes it. Collective: all ranks must call.

        Args:
            only_logging_rank: Only there does it give something, so that the ranks need not hear of each other.

        Returns:
            None where it failed on any rank, but on the logging rank.

        Raises:
            Exception: See `__call__`.
        """
        error: Exception | None = None
        value = None
        try:
            value = function()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a panic of what is written in Rust is no Exception
            error = as_exception(e)
            traceback.clear_frames(e.__traceback__)  # they hold the copy, which is to be free when the ranks meet
        report = [value, None if error is None else describe(error)]
        try:
            found = [report] if only_logging_rank else gather_values(report, self.host.device)
        except Exception as e:  # this rank's value cannot be sent
            found, error = [[None, describe(e)]], e
        reports = [report or [None, "what it found could not be sent"] for report in found]
        failed = {rank: text for rank, (_, text) in enumerate(reports) if text is not None}
        if not failed:
            return [value for value, _ in reports]
        if not self.host.is_logging_rank:
            if error is not None:
                logger.debug("this rank failed: %s", describe_at_length(error))
            return None
        raise error or OtherRankError("; ".join(f"rank {rank}: {text}" for rank, text in failed.items()))

    def _prepare(self, moved: ExitStack) -> float:
        """Moves the parameters to where they can be gathered from; the bytes that are free then."""
        moved.enter_context(self.host.on_device())
        return free_bytes(self.host.device)

    def _plan(self, requests: Sequence[Request], free: float) -> Plan:
        """The same on all ranks, or the same exception: MemoryError where a round does not fit."""
        host, settings = self.host, self.settings
        plan = make_plan(
            len(requests),
            Needs(
                copy=host.num_parameters * self.dtype.itemsize,
                unit=host.largest_unit_bytes,
                sequence=self._sequence_bytes(requests),
                logprobs=self._logprobs_bytes(requests),
            ),
            free,
            world_size(),
            gather=settings.gather,
            ranks=settings.ranks,
            batch_size=settings.batch_size,
            why_not_sharded=host.why_not_sharded() or _why_not_in_step(requests),
        )
        logger.debug("%s for %d prompts; %.1f GiB are free", plan, len(requests), free / 2**30)
        if plan.is_sharded and settings.gather == "auto" and not self.has_warned and host.is_logging_rank:
            self.has_warned = True
            logger.warning(
                "no device has room for a copy of the model: the answers come through the sharded model, which gathers "
                "every layer for every token"
            )
        return plan

    def _sequence_bytes(self, requests: Sequence[Request]) -> int:
        return largest_sequence_bytes(requests, self.host.model_config.get_text_config(), self.dtype)

    def _logprobs_bytes(self, requests: Sequence[Request]) -> int:
        return logprobs_bytes(requests, self.host.model_config.get_text_config(), self.dtype)

    def _with_a_copy(
        self, requests: Sequence[Request], plan: Plan, deadline: float, moved: ExitStack
    ) -> list[list[Any]]:
        """Collective: all ranks must call."""
        model = self.host.gather(self.dtype, keep=bool(requests))
        moved.close()
        if not requests:
            return []
        if model is None:
            raise OtherRankError("another rank could not prepare for the gather")
        model.generation_config = self._special_tokens()
        backend = backend_class(self.settings.backend, self.host.device.type)(
            model, self.host.tokenizer, self.settings.seed, Limits(plan.batch_size, deadline, self.settings.compile)
        )
        return self._timed(backend, requests)

    def _through_the_sharded_model(
        self, requests: Sequence[Request], plan: Plan, deadline: float, moved: ExitStack
    ) -> list[list[Any]]:
        """Collective: all ranks must call."""
        from verl_valgen.backends.lockstep import LockstepBackend
        from verl_valgen.weights.sharded import generating_through

        with generating_through(self.host.model, self._special_tokens(), self.host.device) as model:
            backend = LockstepBackend(
                model, self.host.tokenizer, self.settings.seed, Limits(plan.batch_size, deadline),
                sequence_bytes=self._sequence_bytes(requests), logprobs_bytes=self._logprobs_bytes(requests),
            )  # fmt: skip
            return self._timed(backend, requests)

    def _timed(self, backend: Backend, requests: Sequence[Request]) -> list[list[Any]]:
        start = time.perf_counter()
        with torch.no_grad():
            completions = backend.generate(requests)
        num_tokens = sum(len(completion.output_ids) for completion in completions)
        seconds = time.perf_counter() - start
        logger.debug("generated %d tokens for %d prompts in %.3f s", num_tokens, len(requests), seconds)
        return [list(astuple(completion)) for completion in completions]

    def _special_tokens(self) -> GenerationConfig:
        return special_tokens(self.host.generation_config, self.host.tokenizer)


def _why_not_in_step(requests: Sequence[Request]) -> str | None:
    """Why ranks with different requests could not go through the sharded model in step."""
    for name, neutral in (("guidance_scale", 1.0), ("prefill_chunk_size", None)):
        if any(request.params.get(name, neutral) not in (neutral, None) for request in requests):
            return f"with generation.{name} the number of forward passes differs from rank to rank"
    return None
