"""Hugging Face's `generate` through a sharded model, with all ranks running the same forward passes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from verl_valgen.backends.batching import Group, even_length, group_requests
from verl_valgen.backends.hf import HFBackend
from verl_valgen.backends.memory import fits
from verl_valgen.backends.padding import Sharing, next_batch
from verl_valgen.backends.sharing import how_to_share
from verl_valgen.collectives import agree, largest
from verl_valgen.records import Completion, Request
from verl_valgen.text import describe

_FILLER = Request([0], (0, 0), {"do_sample": False, "max_new_tokens": 1})
"""A request whose answer nobody wants: a rank without requests of its own answers it, to take part in the passes."""
_FILLER_GROUP = Group([0], 1)


class LockstepBackend(HFBackend):
    """Generates through a sharded model, where every forward pass is a collective.

    Each rank brings requests of its own, and takes part in the passes of the others when it has none left.

    Args:
        model: As `sharded.generating_through` yields it.
        sequence_bytes: The most memory that one sequence takes, with all of its beams. Before each batch the allocator
            is asked for it, since a rank that runs out of memory within a forward pass leaves the others waiting.
        logprobs_bytes: The most memory that the log-probability of one answer takes; asked for likewise.
    """

    def __init__(self, *args: Any, sequence_bytes: int, logprobs_bytes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sequence_bytes, self.logprobs_bytes = sequence_bytes, logprobs_bytes
        self._sharing = Sharing.NONE

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completes this rank's requests, as `Backend.generate` says. Collective: all ranks must call.

        Raises:
            Exception: On the ranks concerned, after the last collective.
        """
        device = self.model.device
        completions: list[Completion] = [Completion([], "time")] * len(requests)
        todo = [group for groups in group_requests(requests, self.model.config) for group in groups]
        batch_size = self.batch_size
        # Found by all ranks together: their batches are as alike.
        self._sharing = how_to_share(self, requests, even_length(self.model.config), lambda ok: agree(ok, device))
        error: Exception | None = None
        while largest(len(todo), device) > 0:
            if not agree(time.time() <= self.limits.deadline, device):
                break
            group = todo[0] if todo else _FILLER_GROUP
            batch = next_batch(requests, group.indices, batch_size, self._sharing) if todo else []
            # Twice: while a cache grows, the old and the new one are both there.
            if not agree(fits(2 * self.sequence_bytes * max(1, len(batch)), device), device):
                if batch_size == 1:
                    error = error or MemoryError("not even one sequence fits beside the sharded model")
                    break
                batch_size = math.ceil(batch_size / 2)
                continue
            num_passes = self.model.num_passes
            try:
                answers = self.generate_batch([requests[i] for i in batch] or [_FILLER], group)
            except torch.OutOfMemoryError as e:
                error, todo = e, []
                continue
            except Exception as e:
                answers = [Completion([], "error", error=describe(e))] * len(batch)
                if self.model.num_passes == num_passes:  # the others are in passes that this rank has not begun
                    self.generate_batch([_FILLER], _FILLER_GROUP)
            for i, answer in zip(batch, answers, strict=False):
                completions[i] = answer
            self.on_answers(len(batch))
            if todo:
                del todo[0].indices[: len(batch)]
                todo = [group for group in todo if group.indices]
        error = self._add_logprobs(requests, [] if error else completions) or error
        if error is not None:
            raise error
        return completions

    def _add_logprobs(self, requests: Sequence[Request], completions: list[Completion]) -> Exception | None:
        """Fills in `mean_logprob` where wanted; returns what failed on this rank. Collective: all ranks must call."""
        device = self.model.device
        error: Exception | None = None
        todo = [i for i, completion in enumerate(completions) if requests[i].wants_logprob and completion.output_ids]
        num_steps = int(largest(len(todo), device))
        if num_steps and not agree(fits(self.logprobs_bytes, device), device):
            return MemoryError("the likelihood of an answer does not fit beside the sharded model")
        for _ in range(num_steps):
            if not agree(time.time() <= self.limits.deadline, device):
                break
            i = todo.pop() if todo else None
            try:
                if i is None:
                    self.mean_logprob(_FILLER, Completion([0], "length"))
                else:
                    logprob = self.mean_logprob(requests[i], completions[i])
                    completions[i] = replace(completions[i], mean_logprob=logprob)
            except Exception as e:  # it came after the forward pass, and the others count on this rank for the next
                error, todo = error or e, []
        return error

    def generate_batch(self, requests: Sequence[Request], group: Group) -> list[Completion]:
        # Where the context is full, one token is generated all the same, to take part in the passes of the others.
        completions = super().generate_batch(requests, group._replace(max_new_tokens=max(1, group.max_new_tokens)))
        return completions if group.max_new_tokens > 0 else [Completion([], "length") for _ in requests]

    def call_generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        deferred = DeferredError()
        for name in ("logits_processor", "stopping_criteria"):
            kwargs[name] = type(kwargs[name])(deferred.wrap(item) for item in kwargs[name])
        output_ids = super().call_generate(input_ids, synced_gpus=True, **kwargs)
        deferred.raise_if_any()
        return output_ids


class DeferredError:
    """Holds back an error raised between two forward passes until all passes are over, as other ranks count on them."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def wrap(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wraps a logits processor or a stopping criterion.

        After the first error all wrapped processors leave the scores as they are, and all criteria stop.
        """
        is_processor = isinstance(function, LogitsProcessor)

        def guarded(input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            if self.error is None:
                try:
                    return function(input_ids, scores, **kwargs)
                except Exception as e:
                    self.error = e
            return scores if is_processor else torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)

        return guarded

    def raise_if_any(self) -> None:
        """Raises the error that was held back, if there was one."""
        if self.error is not None:
            raise self.error
