"""Hugging Face's `generate` on a plain model.

Sampling runs as greedy search over perturbed logits (`sampling.py`), so that one path serves both and torch's global
random state is never used.
"""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from verl_valgen.backends.base import Backend
from verl_valgen.backends.batching import Group, groups
from verl_valgen.backends.observers import NanWatch, StopStrings
from verl_valgen.backends.sampling import GumbelNoise, logits_warpers
from verl_valgen.records import Completion, FinishReason, Request
from verl_valgen.settings.generation_config import SAMPLING_ONLY
from verl_valgen.text import describe, describe_at_length

logger = logging.getLogger(__name__)


class HFBackend(Backend):
    """Hugging Face's own loop, whatever it takes: sampling, beams, stop strings, any cache."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        unanswered = Completion([], "time")
        completions = [unanswered] * len(requests)
        for alike in groups(requests, self.model.config):
            try:
                self.begin(requests, alike)
                self._generate_alike(requests, alike, completions)
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # transformers checks much of what it is asked for only while it generates
                traceback.clear_frames(e.__traceback__)
                logger.debug("these parameters failed: %s", describe_at_length(e))
                for i in (i for group in alike for i in group.indices if completions[i] is unanswered):
                    completions[i] = Completion([], "error", error=describe(e))
        return completions

    def begin(self, requests: Sequence[Request], alike: Sequence[Group]) -> None:
        """What follows are these groups, which have the same parameters."""

    def _generate_alike(
        self, requests: Sequence[Request], alike: Sequence[Group], completions: list[Completion]
    ) -> None:
        """Fills in the completions of groups that have the same parameters."""
        batch_size = self.limits.batch_size
        for group in alike:
            todo = group.indices
            while todo and time.time() <= self.limits.deadline:
                batch = [requests[i] for i in todo[:batch_size]]
                try:
                    answers = self.generate_batch(batch, group.max_new_tokens)
                    if batch[0].wants_logprob:
                        answers = self.with_logprobs(batch, answers)
                except torch.OutOfMemoryError as e:
                    if len(batch) == 1:
                        raise
                    batch_size = math.ceil(len(batch) / 2)
                    logger.debug("out of memory with %d prompts at once: going on with %d", len(batch), batch_size)
                    traceback.clear_frames(e.__traceback__)  # they hold what was allocated
                    self.release()
                    continue
                for i, answer in zip(todo, answers, strict=False):  # of which there is a batch
                    completions[i] = answer
                todo = todo[batch_size:]

    def release(self) -> None:
        """Gives back what is kept from one batch for the next."""

    def generate_batch(self, requests: Sequence[Request], max_new_tokens: int) -> list[Completion]:
        """One completion per request of a single batch; all have the same parameters."""
        if max_new_tokens <= 0:  # the prompt fills the model's context
            return [Completion([], "length") for _ in requests]
        device = self.model.device
        input_ids, attention_mask = left_pad([request.input_ids for request in requests], device)  # (B, L) each
        params = requests[0].params
        config = self._generation_config(params, max_new_tokens)

        processors = LogitsProcessorList()
        if params["do_sample"]:
            keys = [request.key for request in requests]
            processors += logits_warpers(params, device)
            processors.append(GumbelNoise(self.seed, keys, input_ids.shape[1], max_new_tokens, device))
        nan_watch = NanWatch(len(requests))
        processors.append(nan_watch)
        criteria = StoppingCriteriaList()
        stop = StopStrings(self.tokenizer, params["stop_strings"]) if params.get("stop_strings") else None
        if stop is not None:
            criteria.append(stop)
        if self.limits.deadline < math.inf:
            now = time.time()
            criteria.append(MaxTimeCriteria(self.limits.deadline - now, initial_timestamp=now))

        output_ids = self.call_generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=criteria,
        )[:, input_ids.shape[1] :].tolist()  # (B, T)
        eos_ids = as_id_set(config.eos_token_id)
        stop_lengths = stop.lengths(input_ids.shape[1]) if stop else [None] * len(requests)
        nan_lengths = nan_watch.lengths(input_ids.shape[1])
        return [
            finish(ids, eos_ids, stop_length, nan_length, max_new_tokens)
            for ids, stop_length, nan_length in zip(output_ids, stop_lengths, nan_lengths, strict=True)
        ]

    def call_generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """What `generate` gives, (B, L + T) int64."""
        model: Any = self.model  # mypy does not see `generate` through transformers' lazy imports
        # Without being told, transformers guesses `synced_gpus` from the number of ranks.
        return model.generate(input_ids, **({"synced_gpus": False} | kwargs))

    def with_logprobs(self, requests: Sequence[Request], completions: Sequence[Completion]) -> list[Completion]:
        """The completions with what a forward pass over prompt and answer says of them.

        One at a time, for there are logits of all its tokens at once.
        """
        return [
            replace(done, mean_logprob=self.mean_logprob(request, done)) if done.output_ids else done
            for request, done in zip(requests, completions, strict=True)
        ]

    def mean_logprob(self, request: Request, completion: Completion) -> float:
        """The mean of ln p(token | what goes before) over the new tokens, of which there is at least one."""
        model: Any = self.model
        ids = torch.tensor([request.input_ids + completion.output_ids], device=model.device)  # (1, L + T)
        num_new = len(completion.output_ids)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        logprobs = logits[0, -num_new - 1 : -1].float().log_softmax(-1)  # (T, V)
        return logprobs.gather(1, ids[0, -num_new:, None]).mean().item()

    def _generation_config(self, params: Mapping[str, Any], max_new_tokens: int) -> GenerationConfig:
        ours = SAMPLING_ONLY | {"do_sample", "stop_strings", "max_new_tokens"}
        special_ids = {
            name: getattr(self.model.generation_config, name)
            for name in ("eos_token_id", "pad_token_id", "bos_token_id")
        }
        others = {name: value for name, value in params.items() if name not in ours}
        return GenerationConfig(**(special_ids | others), max_new_tokens=max_new_tokens, do_sample=False)


def left_pad(sequences: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (B, L) int64 each, padded on the left with id 0, which the mask hides."""
    length = max(len(ids) for ids in sequences)
    input_ids = torch.tensor([[0] * (length - len(ids)) + ids for ids in sequences], device=device)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
    return input_ids, mask


def as_id_set(token_ids: int | list[int] | None) -> set[int]:
    """A token id field of a `GenerationConfig` (one, several or none) as a set."""
    if token_ids is None:
        return set()
    return {token_ids} if isinstance(token_ids, int) else set(token_ids)


def finish(
    output_ids: list[int], eos_ids: set[int], stop_length: int | None, nan_length: int | None, max_new_tokens: int
) -> Completion:
    """Cuts the padding off one sequence of `generate`, and says why it ended.

    Args:
        output_ids: New tokens, padded behind the end with any id (that of end-of-sequence too).
        stop_length: Number of new tokens up to a stop string, None without one.
        nan_length: Number of new tokens before the first that was chosen with NaN among the scores, None without.
    """
    eos_length = next((i + 1 for i, token in enumerate(output_ids) if token in eos_ids), None)
    ends: list[tuple[int, FinishReason]] = []
    if eos_length is not None:
        ends.append((eos_length, "eos"))
    if stop_length is not None:
        ends.append((stop_length, "stop"))
    if not ends:
        ends.append((len(output_ids), "length" if len(output_ids) >= max_new_tokens else "time"))
    length, reason = min(ends)  # of two at one length "eos" comes first
    # What follows the end of a sequence, as long as others of the batch go on, is padding.
    return Completion(output_ids[:length], reason, had_nan=nan_length is not None and nan_length < length)
