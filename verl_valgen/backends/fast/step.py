"""One step of decoding: the tensors of a batch, and the operations on them that add a token to every sequence.

Forward pass, logits processing, sampling, end-of-sequence bookkeeping and the cache's update are tensor operations on
tensors that stay where they are, so that one CUDA graph can hold them. This module knows transformers' models and
processors; loop.py has the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from verl_valgen.backends.batching import as_id_set
from verl_valgen.backends.fast.cache import FixedCache
from verl_valgen.backends.fast.choice import CAPTURABLE, Choice


class Decoder:
    """The state of a batch that is being decoded, and the step that extends it.

    Besides the model it holds the cache, 2 * num_layers * B * num_key_value_heads * L * head_dim numbers of the model's
    dtype, and little else.

    Args:
        model: Unsharded, in eval mode, with torch's or transformers' own attention.
        batch_size: B, the number of sequences in every batch.
        cache_length: L, the most tokens of a padded prompt and its answer.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, cache_length: int) -> None:
        self.model = model
        self.model_logits: Callable[..., Tensor] = model_logits
        device = model.device
        # The next input of the model: (B, 1) tokens at their positions, written into the cache at the slot.
        self.tokens = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.position_ids = torch.zeros_like(self.tokens)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.cache = FixedCache(model.config.get_text_config().num_hidden_layers, cache_length, self.slot)
        # Added to the attention's scores: 0 where the cache holds a token, -inf elsewhere.
        self.mask = torch.zeros(batch_size, 1, 1, cache_length, dtype=model.dtype, device=device)
        # The output so far.
        self.num_new_tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self.output_ids = torch.zeros(batch_size, cache_length, dtype=torch.int64, device=device)  # (B, T)
        self.has_ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.had_nan = torch.zeros_like(self.has_ended)
        self.has_too_many_ties = torch.zeros((), dtype=torch.bool, device=device)
        self.noise_keys = torch.zeros(cache_length, batch_size, dtype=torch.int64, device=device)  # (T, B)

    def set_parameters(self, processors: LogitsProcessorList, config: GenerationConfig) -> None:
        """Sets how tokens are chosen. Every call must set the same, except for the noise: the step is captured once."""
        self.processors = processors
        self.chooses_in_step = all(isinstance(processor, CAPTURABLE) for processor in processors)
        self.pad_id = config.pad_token_id
        self.eos_ids = sorted(as_id_set(config.eos_token_id))
        self.choice = Choice(processors, self.model.config.get_text_config().vocab_size)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor, ended: Tensor, **model_kwargs: Any) -> Tensor:
        """Begins a new batch: runs the model over the prompts and resets all state.

        Args:
            input_ids: (B, S) int64, padded on the left.
            attention_mask: (B, S) int64, 0 at the padding.
            ended: (B,) bool, true for sequences that get no answer.
            model_kwargs: Further arguments of the model's forward pass.

        Returns:
            (B, V) float32 logits of the first new tokens.
        """
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # (B, S)
        self.cache.set_prefill(True)
        logits = model_logits(self.model, self.cache, input_ids, position_ids, attention_mask, **model_kwargs)
        self.cache.set_prefill(False)
        prompt_length = input_ids.shape[1]
        self.mask.fill_(-torch.inf)
        self.mask[:, 0, 0, :prompt_length].masked_fill_(attention_mask.bool(), 0)
        self.position_ids.copy_(position_ids[:, -1:])
        self.slot.fill_(prompt_length - 1)
        self.num_new_tokens.zero_()
        self.has_ended.copy_(ended)
        self.had_nan.zero_()
        self.has_too_many_ties.zero_()
        return logits

    def step(self) -> Tensor:
        """Runs the model on the tokens accepted last, and accepts the next ones if `chooses_in_step`.

        Returns:
            (B, V) float32 logits of the next tokens.
        """
        self.mask.index_fill_(3, self.slot, 0)
        logits = self.model_logits(self.model, self.cache, self.tokens, self.position_ids, self.mask)
        if self.chooses_in_step:
            self.accept(self.choose(logits))
        return logits

    def compile(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Compiles the step with inductor: all of it, or the model alone where the choice sorts a whole vocabulary.

        (Some versions of inductor with some of triton fail on a step with a `cumsum` over the whole vocabulary in it.)
        """
        if not self.choice.sorts_the_vocabulary:
            return torch.compile(step, dynamic=False)
        self.model_logits = torch.compile(model_logits, dynamic=False)
        return step

    def choose(self, scores: Tensor) -> Tensor:
        """Returns the best tokens of (B, V) scores, (B,) int64, and notes what was seen on the way."""
        keys = self.noise_keys.index_select(0, self.num_new_tokens)[0]
        chosen = self.choice(scores, keys)
        self.had_nan |= chosen.had_nan & ~self.has_ended
        self.has_too_many_ties |= (chosen.had_too_many_ties & ~self.has_ended).any()
        return chosen.tokens

    def accept(self, chosen: Tensor) -> None:
        """Appends (B,) tokens to their sequences, padding to those that have ended, and notes which end with them."""
        chosen = torch.where(self.has_ended, self.pad_id, chosen)
        self.output_ids.index_copy_(1, self.num_new_tokens, chosen[:, None])
        for eos_id in self.eos_ids:
            self.has_ended |= chosen == eos_id
        self.tokens.copy_(chosen[:, None])
        for counter in (self.position_ids, self.slot, self.num_new_tokens):
            counter += 1


def model_logits(
    model: Any, cache: FixedCache, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor, **model_kwargs: Any
) -> Tensor:
    """Runs the model on (B, N) tokens and returns the (B, V) float32 logits of the token after the last."""
    output = model(
        input_ids=tokens,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        **model_kwargs,
    )
    return output.logits[:, -1].float()
