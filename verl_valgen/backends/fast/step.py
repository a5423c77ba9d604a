"""One step of decoding: the tensors of the rows, and the operations on them that add a token to each.

Forward pass, logits processing, sampling, end-of-sequence bookkeeping and the cache's update are tensor operations on
tensors that stay where they are, so that one CUDA graph can hold them. This module knows transformers' models and
processors; loop.py has the loop, rows.py which request a row answers. (Over 200 lines, with what fills
the same tensors between steps.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from verl_valgen.backends.batching import as_id_set
from verl_valgen.backends.fast.attention import attention_for_prompts
from verl_valgen.backends.fast.cache import RowCache
from verl_valgen.backends.fast.choice import CAPTURABLE, Choice
from verl_valgen.backends.memory import as_list


class State(NamedTuple):
    """What is known of each row, (B,) int64 each; `NOTHING` for a row without a request."""

    tokens: Any
    """The next input of the model."""
    slots: Any
    """The number of tokens that the cache holds, and so the position of the next input; always below L."""
    num_new_tokens: Any
    limits: Any
    """The largest number of new tokens."""
    has_ended: Any
    """Not 0: the row goes on in vain, until another request gets it."""
    nan_lengths: Any
    """The number of new tokens before the first that was chosen with NaN among the scores; -1 without one."""
    stop_lengths: Any
    """The number of new tokens up to and with the end of a stop string; 0 without one."""
    had_ties: Any
    """Not 0: too many tokens tied with the last of the top_k, so that the answer may be another."""


NOTHING = State(0, 0, 0, 0, 1, -1, 0, 0)


class Method(NamedTuple):
    """How tokens are chosen and what ends an answer: the same for all requests of a kind."""

    choice: Choice | None
    """None: processors that a graph cannot hold choose between the steps."""
    eos_ids: tuple[int, ...]
    pad_id: int

    @classmethod
    def of(cls, processors: LogitsProcessorList, config: GenerationConfig, vocab_size: int) -> Method:
        in_step = all(isinstance(processor, CAPTURABLE) for processor in processors)
        choice = Choice(processors, vocab_size) if in_step else None
        return cls(choice, tuple(sorted(as_id_set(config.eos_token_id))), int(config.pad_token_id or 0))


class Decoder:
    """The rows, and the step that extends them.

    Besides the model it holds the cache, 2 * num_layers * B * num_key_value_heads * L * head_dim numbers of the model's
    dtype, and little else.

    Args:
        model: Unsharded, in eval mode, with torch's or transformers' own attention.
        num_rows: B.
        cache_length: L, the most tokens of a prompt and its answer.
        max_new_tokens: T, the most tokens of an answer.
    """

    def __init__(self, model: Any, num_rows: int, cache_length: int, max_new_tokens: int) -> None:
        self.model, self.device, self.is_on_cuda = model, model.device, model.device.type == "cuda"
        self.num_rows, self.cache_length, self.max_new_tokens = num_rows, cache_length, max_new_tokens
        self.model_logits: Any = model_logits
        self.of_prompts = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        self.state = self._on_device(NOTHING)[:, None].repeat(1, num_rows)
        self.fields = State(*(self.state[i] for i in range(len(NOTHING))))
        # Rows that have ended write to the column behind their answer, and read noise from there.
        self.output_ids = torch.zeros(num_rows, max_new_tokens + 1, dtype=torch.int64, device=self.device)
        self.noise_keys = torch.zeros_like(self.output_ids)
        self.cache = RowCache(model.config.get_text_config().num_hidden_layers, cache_length, self.fields.slots)

    def _on_device(self, values: Sequence[Any]) -> Tensor:
        # From pinned memory, so that the host goes on meanwhile.
        return torch.tensor(values, dtype=torch.int64, pin_memory=self.is_on_cuda).to(self.device, non_blocking=True)

    def prefill(self, rows: Sequence[int], prefixes: Sequence[Sequence[int]]) -> int:
        """Fills rows with the keys and values of prompts without their last tokens, of which there is at least one.

        Returns:
            The number of tokens that each was padded to, on the right: nothing looks at the padding, which comes later.
        """
        length = max(len(prefix) for prefix in prefixes)
        # The padding repeats a token of the prompt, as any other could have an embedding with NaN.
        input_ids = self._on_device([[*prefix, *[prefix[0]] * (length - len(prefix))] for prefix in prefixes])
        position_ids = torch.arange(length, device=self.device).expand(len(rows), -1)
        lengths = self._on_device([len(prefix) for prefix in prefixes])
        self.cache.begin_prompts(self._on_device(rows), lengths, length)
        with attention_for_prompts(self.model):
            self.model(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                position_ids=position_ids,
                past_key_values=self.cache,
                use_cache=True,
                **self.of_prompts,
            )
        return length

    def copy(self, sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int]) -> None:
        """Fills rows with the first tokens of others, so many of each; see `RowCache.copy_rows`."""
        source, target, length = self._on_device([sources, targets, lengths])
        self.cache.copy_rows(source, target, length, max(lengths))

    def begin(self, rows: Sequence[int], states: Sequence[State], noise_keys: Tensor | None) -> None:
        """Begins answers in rows that hold their prompts.

        Args:
            noise_keys: (N, T'), T' <= T, see `sampling.stream_keys`; None where nothing is drawn.
        """
        where = self._on_device(rows)
        self.state.index_copy_(1, where, self._on_device(states).T)
        if noise_keys is not None:
            self.noise_keys[:, : noise_keys.shape[1]].index_copy_(0, where, noise_keys)

    def end(self, rows: Sequence[int]) -> None:
        """Ends answers of which no more is wanted."""
        self.fields.has_ended.index_fill_(0, self._on_device(rows), 1)

    def move(
        self, sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int], others: Sequence[int]
    ) -> None:
        """Moves answers into other rows.

        Args:
            lengths: The number of tokens that the cache holds of each.
            others: The number of tokens of the targets that come into the rows that are left.
        """
        self.copy([*sources, *targets], [*targets, *sources], [*lengths, *others])
        source, target = self._on_device([sources, targets])
        for tensor, dim in ((self.state, 1), (self.output_ids, 0), (self.noise_keys, 0)):
            tensor.index_copy_(dim, target, tensor.index_select(dim, source))
        self.end(sources)
        # Rows that have ended go on writing: behind what they hold.
        self.fields.slots.index_copy_(0, source, self._on_device(others))

    def step(self, method: Method, num_rows: int, reach: int) -> Tensor | None:
        """Runs the model on the next inputs of the first rows, and accepts what is chosen.

        Args:
            reach: More than the number of tokens that any of them holds, if it goes on.

        Returns:
            (num_rows, V) float32 logits, where the step does not choose.
        """
        self.cache.begin_steps(num_rows, reach)
        tokens, slots, num_new_tokens, _, has_ended, nan_lengths, _, had_ties = (f[:num_rows] for f in self.fields)
        # A position of a row that has ended could choose the rotary table of all.
        position_ids = (slots * (has_ended == 0))[:, None]
        is_hidden = torch.arange(reach, device=self.device) > slots[:, None]
        mask = torch.zeros(num_rows, 1, 1, reach, dtype=self.model.dtype, device=self.device)
        mask = mask.masked_fill(is_hidden[:, None, None], -torch.inf)
        logits = self.model_logits(self.model, self.cache, tokens[:, None], position_ids, mask)
        if method.choice is None:
            return logits.float()
        chosen = method.choice(logits, self.noise_keys[:num_rows].gather(1, num_new_tokens[:, None])[:, 0])
        is_live = has_ended == 0
        is_first_nan = chosen.had_nan & is_live & (nan_lengths < 0)
        nan_lengths.copy_(torch.where(is_first_nan, num_new_tokens, nan_lengths))
        had_ties |= chosen.had_too_many_ties & is_live
        self.accept(chosen.tokens, method)
        return None

    def accept(self, chosen: Tensor, method: Method) -> None:
        """Appends (num_rows,) tokens to the answers of the first rows, and notes which end with them."""
        num_rows = len(chosen)
        tokens, slots, num_new_tokens, limits, has_ended, *_ = (field[:num_rows] for field in self.fields)
        is_live = has_ended == 0
        chosen = torch.where(is_live, chosen, method.pad_id)
        self.output_ids[self.cache.place.row_ids[:num_rows], num_new_tokens] = chosen
        tokens.copy_(chosen)
        slots.add_(is_live).clamp_(max=self.cache_length - 1)
        num_new_tokens += is_live
        for eos_id in method.eos_ids:
            has_ended |= chosen == eos_id
        has_ended |= num_new_tokens >= limits

    def look(self, num_rows: int) -> list[State]:
        """Returns what is known of each of the first rows. Waits for the device."""
        return [State(*row) for row in zip(*as_list(self.state[:, :num_rows]), strict=True)]

    def answers(self, rows: Sequence[int], length: int) -> list[list[int]]:
        """Returns the first tokens of these rows' answers, so many of each. Waits for the device."""
        return as_list(self.output_ids[:, :length].index_select(0, self._on_device(rows)))

    def compile(self, step: Callable[[], Tensor | None], method: Method) -> Callable[[], Tensor | None]:
        """Compiles a step with inductor: all of it, or the model alone where the choice sorts a whole vocabulary.

        (Some versions of inductor with some of triton fail on a step with a `cumsum` over the whole vocabulary in it.)
        """
        if method.choice is None or not method.choice.sorts_the_vocabulary:
            return torch.compile(step, dynamic=False)
        self.model_logits = torch.compile(model_logits, dynamic=False)
        return step


def model_logits(model: Any, cache: RowCache, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Runs the model on (B, N) tokens and returns the (B, V) logits of the token after the last."""
    output = model(
        input_ids=tokens,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits[:, -1]
