"""Hugging Face's `generate` through a sharded model, on all ranks in step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from verl_valgen.backends.batching import groups
from verl_valgen.backends.hf import HFBackend
from verl_valgen.collectives import agree, largest
from verl_valgen.records import Completion, Request
from verl_valgen.text import describe

_COMPANY = Request([0], (0, 0), {"do_sample": False, "max_new_tokens": 1})
"""What a rank without requests of its own answers, for the forward passes of the others."""


class LockstepBackend(HFBackend):
    """Every forward pass is a collective: each rank brings requests of its own, and joins in when it has none left.

    Args:
        model: As `sharded.generating_through` gives it.
        sequence_bytes: What one sequence takes, at most, all of its beams together. It is asked of the allocator before
            each batch, for a rank that runs out of memory within a forward pass leaves the others waiting.
        logprobs_bytes: What it takes to say how likely an answer is; asked of it likewise.
    """

    def __init__(self, *args: Any, sequence_bytes: int, logprobs_bytes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sequence_bytes, self.logprobs_bytes = sequence_bytes, logprobs_bytes

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """As for `Backend`, of this rank's requests. Collective: all ranks must call.

        Raises:
            Exception: After the last collective, on the ranks concerned.
        """
        device = self.model.device
        completions: list[Completion] = [Completion([], "time")] * len(requests)
        todo = [group for alike in groups(requests, self.model.config) for group in alike]
        batch_size = self.limits.batch_size
        error: Exception | None = None
        while largest(len(todo), device) > 0:
            if not agree(time.time() <= self.limits.deadline, device):
                break
            batch, limit = (todo[0].indices[:batch_size], todo[0].max_new_tokens) if todo else ([], 1)
            # A cache that grows is there twice while it does.
            if not agree(self._fits(2 * self.sequence_bytes * max(1, len(batch))), device):
                if batch_size == 1:
                    error = error or MemoryError("not even one sequence fits beside the sharded model")
                    break
                batch_size = math.ceil(batch_size / 2)
                continue
            num_passes = self.model.num_passes
            # A rank without requests keeps the others company.
            try:
                answers = self.generate_batch([requests[i] for i in batch] or [_COMPANY], limit)
            except torch.OutOfMemoryError as e:
                error, todo = e, []
                continue
            except Exception as e:
                answers = [Completion([], "error", error=describe(e))] * len(batch)
                if self.model.num_passes == num_passes:  # the others are in passes that this rank has not begun
                    self.generate_batch([_COMPANY], 1)
            for i, answer in zip(batch, answers, strict=False):
                completions[i] = answer
            if todo:
                del todo[0].indices[: len(batch)]
                todo = [group for group in todo if group.indices]
        error = self._add_logprobs(requests, [] if error else completions) or error
        if error is not None:
            raise error
        return completions

    def _add_logprobs(self, requests: Sequence[Request], completions: list[Completion]) -> Exception | None:
        """What failed here, after the last collective. Collective: all ranks must call."""
        device = self.model.device
        error: Exception | None = None
        todo = [i for i, done in enumerate(completions) if requests[i].wants_logprob and done.output_ids]
        num_steps = int(largest(len(todo), device))
        if num_steps and not agree(self._fits(self.logprobs_bytes), device):
            return MemoryError("the likelihood of an answer does not fit beside the sharded model")
        for _ in range(num_steps):
            if not agree(time.time() <= self.limits.deadline, device):
                break
            i = todo.pop() if todo else None
            try:
                if i is None:
                    self.mean_logprob(_COMPANY, Completion([0], "length"))
                else:
                    logprob = self.mean_logprob(requests[i], completions[i])
                    completions[i] = replace(completions[i], mean_logprob=logprob)
            except Exception as e:  # behind the forward pass: the others count on the next
                error, todo = error or e, []
        return error

    def _fits(self, num_bytes: int) -> bool:
        device = self.model.device
        try:
            torch.empty(num_bytes if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            return False
        return True

    def generate_batch(self, requests: Sequence[Request], max_new_tokens: int) -> list[Completion]:
        # One token where the context is full, for the passes of the others.
        completions = super().generate_batch(requests, max(1, max_new_tokens))
        return completions if max_new_tokens > 0 else [Completion([], "length") for _ in requests]

    def call_generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        guard = Guard()
        for name in ("logits_processor", "stopping_criteria"):
            kwargs[name] = type(kwargs[name])(guard.around(item) for item in kwargs[name])
        output_ids = super().call_generate(input_ids, synced_gpus=True, **kwargs)
        guard.check()
        return output_ids


class Guard:
    """Keeps what fails between two forward passes until they are over: the other ranks count on the next one."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def around(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Once one failed, a logits processor leaves the scores as they are, and a stopping criterion stops."""
        is_processor = isinstance(function, LogitsProcessor)

        def guarded(input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            if self.error is None:
                try:
                    return function(input_ids, scores, **kwargs)
                except Exception as e:
                    self.error = e
            return scores if is_processor else torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)

        return guarded

    def check(self) -> None:
        if self.error is not None:
            raise self.error
