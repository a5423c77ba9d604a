"""Hugging Face's `generate` as a backend.

Sampling runs as greedy search over perturbed logits (`sampling.py`), so that one code path serves both and torch's
global random state is never used. (Over 200 lines, as subclasses override a part of each: of the batches, of a batch,
and of the call.)
"""

from __future__ import annotations

import logging
import math
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from verl_valgen.backends.base import Backend, UnsuitableError
from verl_valgen.backends.batching import Group, as_id_set, even_length, group_requests
from verl_valgen.backends.beams import BeamObserver
from verl_valgen.backends.judging import logprobs
from verl_valgen.backends.memory import as_list
from verl_valgen.backends.observers import NanObserver, StopStringObserver
from verl_valgen.backends.padding import Sharing, left_pad, next_batch
from verl_valgen.backends.sampling import GumbelNoise, logits_warpers
from verl_valgen.backends.sharing import how_to_share
from verl_valgen.records import Completion, FinishReason, Request
from verl_valgen.settings.generation_config import SAMPLING_ONLY
from verl_valgen.text import describe, describe_at_length

logger = logging.getLogger(__name__)

WITHOUT_PROCESSORS = SAMPLING_ONLY | {
    *("do_sample", "max_new_tokens", "stop_strings", "eos_token_id", "pad_token_id", "bos_token_id"),
    *("max_time", "use_cache", "cache_implementation"),
}
"""Parameters that `generate` makes no logits processor of, sampling being done here."""
_OF_CACHES = {"cache_implementation", "prefill_chunk_size", "use_cache"}


def has_processors(request: Request) -> bool:
    """Whether `generate` itself may make logits processors of a request's parameters."""
    return not request.params.keys() <= WITHOUT_PROCESSORS


class HFBackend(Backend):
    """Generates with Hugging Face's own loop and everything that it supports: beams, stop strings, any cache."""

    most_at_once: int = sys.maxsize
    """The number of requests for which there is memory, as far as is known: halved whenever there was too little."""
    most_in_a_batch: int = sys.maxsize
    """The largest number of requests that begin together, where more may be at once in another way."""
    _sharing: Sharing | None = None
    """Which prompts may share a batch, once that was asked."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        unanswered = Completion([], "time")
        completions = [unanswered] * len(requests)
        for groups in group_requests(requests, self.model.config):
            try:
                self.prepare(requests, groups)
                self.generate_groups(requests, groups, completions)
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # transformers checks many parameters only while it generates
                traceback.clear_frames(e.__traceback__)
                logger.debug("these parameters failed: %s", describe_at_length(e))
                failed = [i for group in groups for i in group.indices if completions[i] is unanswered]
                for i in failed:
                    completions[i] = Completion([], "error", error=describe(e))
                self.on_answers(len(failed))
        return completions

    @property
    def batch_size(self) -> int:
        """The largest number of requests in one batch."""
        return 1 if self.limits.one_at_a_time else min(self.limits.batch_size, self.most_at_once)

    def prepare(self, requests: Sequence[Request], groups: Sequence[Group]) -> None:
        """Called before the batches of these groups, which share their parameters. A hook for subclasses."""

    def release(self) -> None:
        """Frees what is kept from one batch for the next. A hook for subclasses."""

    def sharing(self, requests: Sequence[Request]) -> Sharing:
        """Says which prompts may share a batch."""
        if self._sharing is None:  # a lookup even then, by the whole configuration
            self._sharing = how_to_share(self, requests, even_length(self.model.config))
        return self._sharing

    def generate_groups(
        self, requests: Sequence[Request], groups: Sequence[Group], completions: list[Completion]
    ) -> None:
        """Fills in the completions of groups that share their parameters."""
        for group in groups:
            todo = group.indices
            while todo and time.time() <= self.limits.deadline:
                most = min(self.batch_size, self.most_in_a_batch)
                indices = next_batch(requests, todo, most, self.sharing(requests))
                batch = [requests[i] for i in indices]
                try:
                    answers = self.generate_batch(batch, group)
                    if batch[0].wants_logprob:
                        answers = self.with_logprobs(batch, answers)
                except torch.OutOfMemoryError as e:
                    if len(batch) == 1:
                        raise
                    self.most_at_once = math.ceil(len(batch) / 2)
                    logger.debug("out of memory with %d prompts at once: going on with %d", len(batch), self.batch_size)
                    traceback.clear_frames(e.__traceback__)  # they hold what was allocated
                    self.release()
                    continue
                for i, answer in zip(indices, answers, strict=True):
                    completions[i] = answer
                self.on_answers(len(indices))
                todo = todo[len(indices) :]

    def generate_batch(self, requests: Sequence[Request], group: Group) -> list[Completion]:
        """Returns one completion per request of a single batch.

        Args:
            requests: B requests with equal parameters.
            group: The group that they belong to. Its `max_new_tokens` stands in place of the parameter of that name.
        """
        max_new_tokens = group.max_new_tokens
        if max_new_tokens <= 0:
            return [Completion([], "length") for _ in requests]
        device = self.model.device
        input_ids, attention_mask = left_pad([request.input_ids for request in requests], device)  # (B, L) each
        params = requests[0].params
        config = self._generation_config(params, max_new_tokens)
        if not group.use_cache or self.sharing(requests) is Sharing.NOT_EVEN_A_CACHE:
            config.use_cache = False

        processors = LogitsProcessorList()
        if params["do_sample"]:
            keys = [request.key for request in requests]
            processors += logits_warpers(params, device)
            processors.append(GumbelNoise(self.seed, keys, input_ids.shape[1], max_new_tokens, device))
        beams: BeamObserver | None = None
        if params.get("num_beams", 1) > 1 and not params["do_sample"]:
            beams = BeamObserver(len(requests), len(as_id_set(config.eos_token_id)))
            processors.append(beams)
        nans = NanObserver(len(requests))
        processors.append(nans)
        criteria = StoppingCriteriaList()
        stops = StopStringObserver(self.tokenizer, params["stop_strings"]) if params.get("stop_strings") else None
        if stops is not None:
            criteria.append(stops)
        if self.limits.deadline < math.inf:
            now = time.time()
            criteria.append(MaxTimeCriteria(self.limits.deadline - now, initial_timestamp=now))

        sequences = self.call_generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=criteria,
        )
        output_ids = as_list(sequences[:, input_ids.shape[1] :])  # (B, T)
        eos_ids = as_id_set(config.eos_token_id)
        stop_lengths = stops.lengths(input_ids.shape[1]) if stops else [None] * len(requests)
        nan_lengths = nans.lengths(input_ids.shape[1])
        completions = [
            finish(ids, eos_ids, stop_length, nan_length, max_new_tokens)
            for ids, stop_length, nan_length in zip(output_ids, stop_lengths, nan_lengths, strict=True)
        ]
        sums = beams.sums([c.output_ids for c in completions]) if beams else [None] * len(requests)
        return [
            replace(completion, sum_logprob=total, num_padding=input_ids.shape[1] - len(request.input_ids))
            for request, completion, total in zip(requests, completions, sums, strict=True)
        ]

    def call_generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Calls transformers' `generate` on (B, L) prompts; returns (B, L + T) int64. Subclasses add arguments here."""
        model: Any = self.model  # mypy does not see `generate` through transformers' lazy imports
        # Unless it is told, transformers guesses `synced_gpus` from the number of ranks.
        return model.generate(input_ids, **({"synced_gpus": False} | kwargs))

    def with_logprobs(self, requests: Sequence[Request], completions: Sequence[Completion]) -> list[Completion]:
        """Returns the completions with `mean_logprob` filled in, except for empty ones.

        One at a time: a forward pass over prompt and answer has the logits of all their tokens at once.
        """
        return [
            replace(completion, mean_logprob=self.mean_logprob(request, completion))
            if completion.output_ids
            else completion
            for request, completion in zip(requests, completions, strict=True)
        ]

    def mean_logprob(self, request: Request, completion: Completion) -> float:
        """Returns the mean of ln p(token | preceding tokens) over the new tokens, of which there is at least one.

        p is the softmax, in float32, of the model's logits before any processor.
        """
        model: Any = self.model
        ids = torch.tensor([request.input_ids + completion.output_ids], device=model.device)  # (1, L + T)
        num_new = len(completion.output_ids)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return logprobs(logits[0, -num_new - 1 : -1], completion.output_ids).mean().item()

    def logits_processors(self, request: Request) -> LogitsProcessorList:
        """What `generate` itself makes of a request's parameters: no warper, as nothing is sampled for transformers.

        Raises:
            UnsuitableError: This version of transformers does not tell.
        """
        prepared = LogitsProcessorList()
        if not has_processors(request):
            return prepared
        if Version(transformers.__version__) < Version("4.57"):
            raise UnsuitableError(f"transformers {transformers.__version__} does not show its logits processors")

        def keep(model: Any, input_ids: Tensor, *, logits_processor: Any, **kwargs: Any) -> Tensor:
            prepared.extend(logits_processor)
            return input_ids

        input_ids, attention_mask = left_pad([request.input_ids], self.model.device)
        params = {name: value for name, value in request.params.items() if name not in _OF_CACHES}
        config = self._generation_config({**params, "use_cache": False}, params["max_new_tokens"])
        HFBackend.call_generate(
            self, input_ids, attention_mask=attention_mask, generation_config=config, custom_generate=keep
        )
        return prepared

    def _generation_config(self, params: Mapping[str, Any], max_new_tokens: int) -> GenerationConfig:
        """Returns greedy search with the request's other parameters: sampling and stop strings are handled here."""
        handled_here = SAMPLING_ONLY | {"do_sample", "stop_strings", "max_new_tokens"}
        special_ids = {
            name: getattr(self.model.generation_config, name)
            for name in ("eos_token_id", "pad_token_id", "bos_token_id")
        }
        others = {name: value for name, value in params.items() if name not in handled_here}
        return GenerationConfig(**(special_ids | others), max_new_tokens=max_new_tokens, do_sample=False)


def finish(
    output_ids: list[int], eos_ids: set[int], stop_length: int | None, nan_length: int | None, max_new_tokens: int
) -> Completion:
    """Cuts the padding off one generated sequence and says why it ended.

    Args:
        output_ids: New tokens, padded behind the end with any id (that of end-of-sequence too).
        eos_ids: The ids that end a sequence.
        stop_length: Number of new tokens up to and with the end of a stop string, None without one.
        nan_length: Number of new tokens before the first that was chosen with NaN among the scores, None without one.
        max_new_tokens: The limit that generation ran with; fewer tokens without another reason mean "time".
    """
    eos_length = next((i + 1 for i, token in enumerate(output_ids) if token in eos_ids), None)
    ends: list[tuple[int, FinishReason]] = []
    if eos_length is not None:
        ends.append((eos_length, "eos"))
    if stop_length is not None:
        ends.append((stop_length, "stop"))
    if not ends:
        ends.append((len(output_ids), "length" if len(output_ids) >= max_new_tokens else "time"))
    length, reason = min(ends)  # "eos" sorts before "stop" at the same length
    # Tokens behind the end are padding: other sequences of the batch went on.
    return Completion(output_ids[:length], reason, had_nan=nan_length is not None and nan_length < length)
