"""The loop behind `generate(..., custom_generate=...)`: prefill, then one step per token, captured as a CUDA graph.

Without CUDA the same steps run operation by operation. This module knows transformers' `generate`, and nothing of
requests, ranks or trackers; `decoder.py` has what a step does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from verl_valgen.backends.base import UnsuitableError
from verl_valgen.backends.fast.attention import attention_for_decoding
from verl_valgen.backends.fast.cuda_graph import CudaGraph
from verl_valgen.backends.fast.step import Decoder
from verl_valgen.backends.observers import NanWatch
from verl_valgen.backends.sampling import GumbelNoise

CHECK_EVERY = 8
"""Tokens from one look at "have all ended?" to the next. At each the device waits for the host."""


class DecodingLoop:
    """A decoding method: greedy search, which with `GumbelNoise` among the processors is sampling.

    One is for batches with the same parameters, one after the other; the step is captured once.

    Args:
        model: Plain, in eval mode, and one that `fast.why_unsuitable` has nothing against.
        batch_size: B, the most sequences of a batch; smaller batches are filled up.
        cache_length: L, the most tokens of a padded prompt and its answer.
        compile: Whether the step goes through inductor.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, cache_length: int, *, compile: bool = False) -> None:
        self.batch_size, self.cache_length = batch_size, cache_length
        self.compile = compile
        self.decoder = Decoder(model, batch_size, cache_length)
        self.step: Callable[[], Tensor] | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: Any,  # a LogitsProcessorList
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """Completes (B', S) prompts, B' <= B, with the `attention_mask` among the model's arguments.

        Returns:
            (B', S + T) int64; behind the end of a sequence any tokens.

        Raises:
            UnsuitableError: transformers' own loop can do what this one cannot.
        """
        decoder = self.decoder
        num_sequences, prompt_length = input_ids.shape
        watchers, max_length, deadline = _sorted_out(stopping_criteria)
        filled_up = torch.arange(self.batch_size, device=input_ids.device)
        ended, filled_up = filled_up >= num_sequences, filled_up.clamp(max=num_sequences - 1)
        decoder.set_parameters(logits_processor, generation_config)
        step = self.step = self.step or self._new_step()
        for noise in (processor for processor in logits_processor if isinstance(processor, GumbelNoise)):
            decoder.noise_keys[: len(noise.keys)] = noise.keys[:, filled_up]

        def ids(length: int) -> Tensor:
            return torch.cat([input_ids, decoder.output_ids[:num_sequences, : length - prompt_length]], dim=1)

        def choose_between(logits: Tensor, length: int) -> None:
            """What a step has left undone."""
            logits[:num_sequences] = logits_processor(ids(length), logits[:num_sequences].clone())
            decoder.accept(logits.argmax(-1))

        # `logits_to_keep` is there only where the model knows it.
        extra = {name: model_kwargs[name] for name in ("logits_to_keep",) if name in model_kwargs}
        logits = decoder.prefill(input_ids[filled_up], model_kwargs["attention_mask"][filled_up], ended, **extra)
        if decoder.chooses_in_step:
            decoder.accept(decoder.choose(logits))
        else:
            choose_between(logits, prompt_length)
        length = prompt_length + 1
        with attention_for_decoding(model):
            while length < max_length:
                for watcher in watchers:
                    decoder.has_ended[:num_sequences] |= watcher(ids(length), None)
                is_time_to_look = watchers or (length - prompt_length) % CHECK_EVERY == 0
                if is_time_to_look and (bool(decoder.has_ended.all()) or time.time() > deadline):
                    break
                logits = step()
                if not decoder.chooses_in_step:
                    choose_between(logits, length)
                length += 1
        for watcher in watchers:
            watcher(ids(length), None)
        if decoder.chooses_in_step:
            for watch in (processor for processor in logits_processor if isinstance(processor, NanWatch)):
                watch.note(decoder.had_nan[:num_sequences], prompt_length)  # before they ended
        if bool(decoder.has_too_many_ties):
            raise UnsuitableError("too many tokens tie with the last of the top_k")
        return ids(length)

    def _new_step(self) -> Callable[[], Tensor]:
        step: Callable[[], Tensor] = self.decoder.step
        if self.compile:
            step = self.decoder.compile(step)
        return CudaGraph(step) if self.decoder.model.device.type == "cuda" else step


def _sorted_out(criteria: StoppingCriteriaList) -> tuple[list[StoppingCriteria], int, float]:
    """What the loop does not see by itself; the most tokens of a sequence; and the time at which it must be over."""
    watchers: list[StoppingCriteria] = []
    max_length, deadline = math.inf, math.inf
    for criterion in criteria:
        if isinstance(criterion, MaxLengthCriteria):
            max_length = min(max_length, criterion.max_length)
        elif isinstance(criterion, MaxTimeCriteria):
            deadline = min(deadline, criterion.initial_timestamp + criterion.max_time)
        elif not isinstance(criterion, EosTokenCriteria):
            watchers.append(criterion)
    return watchers, int(max_length), deadline
