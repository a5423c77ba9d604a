"""The loop behind `generate(..., custom_generate=...)`: prefill, then one step per token, captured as a CUDA graph.

Without CUDA the same steps run operation by operation. This module knows transformers' `generate`, and nothing of
requests, ranks or trackers; step.py has the step.
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
from verl_valgen.backends.observers import NanObserver
from verl_valgen.backends.sampling import GumbelNoise

CHECK_EVERY = 8
"""Number of tokens from one look at whether all sequences have ended to the next. Each waits for the device."""


class DecodingLoop:
    """A decoding method for transformers: greedy search, which `GumbelNoise` among the processors makes sampling.

    One loop serves batches with equal parameters, one after the other, so that the step is captured only once.

    Args:
        model: Unsharded, in eval mode, and suitable in the sense of `why_unsuitable`.
        batch_size: B, the most sequences of a batch; smaller batches are filled up with repetitions.
        cache_length: L, the most tokens of a padded prompt and its answer.
        compile: Whether the step is compiled with inductor.
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
        """Completes a batch of prompts; transformers calls this in place of its own loop.

        Args:
            model: The model that the loop was made with.
            input_ids: (B', S) int64, padded on the left, B' <= B.
            model_kwargs: Prepared by transformers; `attention_mask` is (B', S).

        Returns:
            (B', S + T) int64; tokens behind the end of a sequence mean nothing.

        Raises:
            UnsuitableError: Too many tokens tie, or the step cannot be captured. transformers' own loop would do.
        """
        decoder = self.decoder
        num_sequences, prompt_length = input_ids.shape
        host_criteria, max_length, deadline = _split_criteria(stopping_criteria)
        filled_up = torch.arange(self.batch_size, device=input_ids.device)
        ended, filled_up = filled_up >= num_sequences, filled_up.clamp(max=num_sequences - 1)
        decoder.set_parameters(logits_processor, generation_config)
        step = self.step = self.step or self._new_step()
        for noise in (processor for processor in logits_processor if isinstance(processor, GumbelNoise)):
            decoder.noise_keys[: len(noise.keys)] = noise.keys[:, filled_up]

        def ids(length: int) -> Tensor:
            return torch.cat([input_ids, decoder.output_ids[:num_sequences, : length - prompt_length]], dim=1)

        def choose_between_steps(logits: Tensor, length: int) -> None:
            """Chooses the next tokens where a graph cannot hold the processors."""
            logits[:num_sequences] = logits_processor(ids(length), logits[:num_sequences].clone())
            decoder.accept(logits.argmax(-1))

        # `logits_to_keep` is there only where the model knows it.
        extra = {name: model_kwargs[name] for name in ("logits_to_keep",) if name in model_kwargs}
        logits = decoder.prefill(input_ids[filled_up], model_kwargs["attention_mask"][filled_up], ended, **extra)
        if decoder.chooses_in_step:
            decoder.accept(decoder.choose(logits))
        else:
            choose_between_steps(logits, prompt_length)
        length = prompt_length + 1
        with attention_for_decoding(model):
            while length < max_length:
                for criterion in host_criteria:
                    decoder.has_ended[:num_sequences] |= criterion(ids(length), None)
                is_time_to_look = host_criteria or (length - prompt_length) % CHECK_EVERY == 0
                if is_time_to_look and (bool(decoder.has_ended.all()) or time.time() > deadline):
                    break
                logits = step()
                if not decoder.chooses_in_step:
                    choose_between_steps(logits, length)
                length += 1
        for criterion in host_criteria:
            criterion(ids(length), None)
        if decoder.chooses_in_step:
            # The step notes NaN in sequences that have not ended, but not when: recorded as at their first token.
            for observer in (processor for processor in logits_processor if isinstance(processor, NanObserver)):
                observer.record(decoder.had_nan[:num_sequences], prompt_length)
        if bool(decoder.has_too_many_ties):
            raise UnsuitableError("too many tokens tie with the last of the top_k")
        return ids(length)

    def _new_step(self) -> Callable[[], Tensor]:
        step: Callable[[], Tensor] = self.decoder.step
        if self.compile:
            step = self.decoder.compile(step)
        return CudaGraph(step) if self.decoder.model.device.type == "cuda" else step


def _split_criteria(criteria: StoppingCriteriaList) -> tuple[list[StoppingCriteria], int, float]:
    """Splits stopping criteria into those that the loop must call and those that it checks by itself.

    Returns:
        The criteria to call after every token; the most tokens of a sequence, prompt included; and the deadline as
        `time.time()`. (The step itself notes end-of-sequence tokens.)
    """
    host_criteria: list[StoppingCriteria] = []
    max_length, deadline = math.inf, math.inf
    for criterion in criteria:
        if isinstance(criterion, MaxLengthCriteria):
            max_length = min(max_length, criterion.max_length)
        elif isinstance(criterion, MaxTimeCriteria):
            deadline = min(deadline, criterion.initial_timestamp + criterion.max_time)
        elif not isinstance(criterion, EosTokenCriteria):
            host_criteria.append(criterion)
    return host_criteria, int(max_length), deadline
