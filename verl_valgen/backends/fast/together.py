"""Batches that begin together and are not refilled: for processors that a graph cannot hold.

They run between two steps, and look at all tokens of a sequence: at prompts that are padded on the left, as
transformers would pass them.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from verl_valgen.backends.fast.attention import attention_for_decoding
from verl_valgen.backends.fast.loop import CHECK_EVERY, DecodingLoop
from verl_valgen.backends.fast.rows import in_chunks
from verl_valgen.backends.fast.step import NOTHING, Method
from verl_valgen.backends.lengths import MOST_PROMPT_TOKENS
from verl_valgen.backends.memory import as_list


class Batch:
    """A decoding method for transformers that answers the prompts that `generate` is given.

    Args:
        loop: Whose rows are used; at the end all are free.
        num_rows: The number of rows of a step. Smaller batches leave some of them empty.
    """

    def __init__(self, loop: DecodingLoop, num_rows: int) -> None:
        self.loop, self.num_rows = loop, num_rows

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
            input_ids: (B', S) int64, padded on the left, B' at most `num_rows`.
            model_kwargs: Prepared by transformers; `attention_mask` is (B', S).

        Returns:
            (B', S + T) int64; tokens behind the end of a sequence mean nothing.

        Raises:
            UnsuitableError: The step cannot be captured. transformers' own loop would do.
        """
        decoder, num_sequences = self.loop.decoder, len(input_ids)
        host_criteria, max_length, deadline = _split_criteria(stopping_criteria)
        method = Method.of(LogitsProcessorList(), generation_config, 0)._replace(choice=None)
        self._begin(input_ids, model_kwargs["attention_mask"], int(max_length) - input_ids.shape[1])
        step, ended = self.loop.step("", method, self.num_rows), decoder.fields.has_ended
        cat, length = input_ids, input_ids.shape[1]
        try:
            with attention_for_decoding(model, decoder.cache):
                while length < max_length:
                    logits = step()
                    assert logits is not None
                    scores = logits_processor(cat, logits[:num_sequences].clone())
                    decoder.accept(scores.argmax(-1), method)
                    length += 1
                    cat = torch.cat([input_ids, decoder.output_ids[:num_sequences, : length - input_ids.shape[1]]], 1)
                    for criterion in host_criteria:
                        ended[:num_sequences] |= criterion(cat, None)
                    is_time_to_look = host_criteria or (length - input_ids.shape[1]) % CHECK_EVERY == 0
                    if is_time_to_look and (bool(ended[:num_sequences].all()) or time.time() > deadline):
                        break
        finally:
            decoder.end(range(num_sequences))
        return cat

    def _begin(self, input_ids: Tensor, attention_mask: Tensor, limit: int) -> None:
        """Fills the first rows with the prompts, without their padding."""
        decoder = self.loop.decoder
        nums_tokens = as_list(attention_mask.sum(-1))
        prompts = [ids[len(ids) - number :] for ids, number in zip(as_list(input_ids), nums_tokens, strict=True)]
        rows = range(len(prompts))
        self.loop.rows.forget(rows)
        lengths = {row: len(prompt) - 1 for row, prompt in enumerate(prompts) if len(prompt) > 1}
        for chunk in in_chunks(lengths, MOST_PROMPT_TOKENS):
            decoder.prefill(chunk, [prompts[row][:-1] for row in chunk])
        if empty := [row for row in rows if len(prompts[row]) == 1]:
            decoder.copy(empty, empty, [0] * len(empty))
        states = [
            NOTHING._replace(tokens=prompt[-1], slots=len(prompt) - 1, limits=limit, has_ended=0) for prompt in prompts
        ]
        decoder.begin(rows, states, None)


def _split_criteria(criteria: StoppingCriteriaList) -> tuple[list[StoppingCriteria], float, float]:
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
    return host_criteria, max_length, deadline
