"""The loop behind `generate(..., custom_generate=...)`: rows that are refilled, and steps captured as CUDA graphs.

Without CUDA the same steps run operation by operation. This module knows transformers' `generate`, and of requests what
a row needs; step.py has the step, rows.py the rows, together.py batches that are not refilled. (Over 200 lines, as a
run from admission to answers is read together.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from verl_valgen.backends.base import UnsuitableError
from verl_valgen.backends.fast.attention import attention_for_decoding
from verl_valgen.backends.fast.cuda_graph import CudaGraph
from verl_valgen.backends.fast.rows import Admission, Rows, Waiting, in_chunks, sizes
from verl_valgen.backends.fast.step import NOTHING, Decoder, Method, State, model_logits
from verl_valgen.backends.fast.stops import StopStrings
from verl_valgen.backends.hf import finish
from verl_valgen.backends.lengths import MOST_PROMPT_TOKENS
from verl_valgen.backends.sampling import stream_keys
from verl_valgen.records import Completion, Request

CHECK_EVERY = 8
"""Number of tokens from one look of the host to the next. Each waits for the device."""
CHECK_EVERY_ON_CPU = 4
"""The same where there is no device to wait for."""
FEWEST_ROWS = 16
"""A step of fewer rows takes no less time, so that no graph is captured for them."""
REFILL_SHARE = 16
"""Prompts are read when one of so many rows is free."""

Step = Callable[[], Tensor | None]


class DecodingLoop:
    """Rows with a cache, and the steps that were captured for them.

    One loop serves all requests of a round, kind after kind, so that memory is allocated once, a step is captured once,
    and prompts that rows still hold are found.

    Args:
        model: Unsharded, in eval mode, and suitable in the sense of `why_unsuitable`.
        num_rows: B, the most sequences at once.
        cache_length: L, the most tokens of a prompt and its answer.
        max_new_tokens: T, the most tokens of an answer.
        compile: Whether steps are compiled with inductor.
        captures: Whether steps become CUDA graphs, on CUDA.
        key: Equal for models that launch the same kernels.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_rows: int,
        cache_length: int,
        max_new_tokens: int,
        *,
        compile: bool = False,
        captures: bool = True,
        key: Hashable = None,
    ) -> None:
        self.num_rows, self.compile = num_rows, compile
        self.decoder = Decoder(model, num_rows, cache_length, max_new_tokens)
        self.rows = Rows(num_rows)
        self.is_on_cuda = model.device.type == "cuda"
        self.captures = captures and self.is_on_cuda
        self.has_fixed_shapes = self.is_on_cuda or compile
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None
        self.key = (key, num_rows, cache_length, compile)
        self.is_sealed = False
        self._steps: dict[tuple[str, int], Step] = {}

    def step(self, kind: str, method: Method, num_rows: int) -> Step:
        """Returns the step of the first rows: from its second call on a graph, where steps are captured.

        Args:
            kind: Equal for equal methods.
        """
        if (kind, num_rows) not in self._steps:
            decoder = self.decoder

            def step() -> Tensor | None:
                return decoder.step(method, num_rows, decoder.cache_length)

            if self.is_sealed:
                return step
            function: Step = decoder.compile(step, method) if self.compile else step
            # What is allocated at the first step is not to lie in a graph's memory.
            key = (self.key, kind, num_rows) if decoder.cache.is_allocated else None
            self._steps[kind, num_rows] = CudaGraph(function, self.pool, key) if self.captures else function
        return self._steps[kind, num_rows]

    def sizes(self, num_rows: int) -> list[int]:
        """The numbers of rows that a run of so many goes through, where shapes are fixed."""
        return [num_rows] if self.compile else sizes(num_rows, FEWEST_ROWS)

    def capture(self, kind: str, method: Method, nums_rows: Sequence[int]) -> None:
        """Captures steps of so many rows each, on rows that have all ended."""
        if not self.captures:
            return
        with attention_for_decoding(self.decoder.model, self.decoder.cache):
            for num_rows in nums_rows:
                step = self.step(kind, method, num_rows)
                while isinstance(step, CudaGraph) and step.graph is None:
                    step()

    def seal(self) -> None:
        """From now on nothing is captured or compiled: steps that no graph holds run operation by operation."""
        self.is_sealed, self.has_fixed_shapes = True, self.is_on_cuda
        self.decoder.model_logits = model_logits

    def forget_steps(self) -> None:
        """Frees what was captured."""
        self._steps.clear()
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None  # the one before is gone with its graphs


@dataclass
class Asked:
    """Requests of one kind, for a run of the loop."""

    kind: str
    """Equal for requests with equal parameters."""
    requests: Sequence[Request]
    limits: Sequence[int]
    """The largest number of new tokens of each, at least 1."""
    seed: int
    draws: bool
    """Whether tokens are drawn."""
    stops: StopStringCriteria | None
    deadline: float
    """`time.time()` when answers that are unfinished end."""
    on_answers: Callable[[list[tuple[int, Completion]]], None]
    """Called with the indices of requests and their answers, as they come to an end."""


class Run:
    """A decoding method for transformers that answers all requests that it is given: greedy search, perturbed by noise.

    Args:
        loop: Whose rows are used; at the end all are free.
        captures_only: Whether nothing is answered, but what answering needs is captured.
    """

    def __init__(self, loop: DecodingLoop, asked: Asked, *, captures_only: bool = False) -> None:
        self.loop, self.asked, self.captures_only = loop, asked, captures_only
        self.decoder, self.rows = loop.decoder, loop.rows
        self.states: list[State] = [NOTHING] * loop.num_rows
        self.padding = [0] * loop.num_rows
        self.stops: StopStrings | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """Answers the requests; transformers calls this in place of its own loop.

        Args:
            model: The model that the loop was made with.
            input_ids: Not looked at, and returned.
            model_kwargs: Prepared by transformers, and not needed.

        Raises:
            UnsuitableError: Too many tokens tie, or the step cannot be captured. transformers' own loop would do.
        """
        self.method = Method.of(logits_processor, generation_config, model.config.get_text_config().vocab_size)
        known = EosTokenCriteria | MaxLengthCriteria
        if self.method.choice is None or not all(isinstance(criterion, known) for criterion in stopping_criteria):
            raise UnsuitableError("a step does not hold all processors and criteria")
        num_rows = min(self.loop.num_rows, len(self.asked.requests))
        if self.captures_only:
            self.loop.capture(self.asked.kind, self.method, self.loop.sizes(num_rows))
            return input_ids
        asked = self.asked
        if asked.stops is not None:
            self.stops = StopStrings(asked.stops, self.loop.num_rows, model.device)
        try:
            self._answer(num_rows)
        except BaseException:
            self.rows.forget(range(len(self.rows)))  # rows are noted to hold prompts before they do
            raise
        finally:
            if live := self.rows.live():
                self.rows.release(live)
                self.decoder.end(live)
        return input_ids

    def _answer(self, num_rows: int) -> None:
        waiting = Waiting({i: tuple(request.input_ids[:-1]) for i, request in enumerate(self.asked.requests)})
        size = num_rows
        while True:
            num_free = num_rows - len(self.rows.live())
            if waiting and num_free >= min(len(waiting), math.ceil(num_rows / REFILL_SHARE)):
                self._admit(self.rows.give(waiting, num_rows))
            live = self.rows.live()
            if not live:
                return
            if not self.loop.has_fixed_shapes:
                size = len(live)
            elif not waiting:
                size = min(other for other in self.loop.sizes(num_rows) if other >= len(live))
            self._move_together(size)
            self._take_steps(size)
            if time.time() > self.asked.deadline:
                self._harvest(self.rows.live())
                return

    def _admit(self, given: list[Admission]) -> None:
        """Fills rows with the prompts of their requests, and begins their answers."""
        asked, decoder = self.asked, self.decoder
        prompts = {one.row: asked.requests[one.request].input_ids for one in given}
        # Of a prompt of one token nothing is computed; the row is emptied.
        lengths = {row: len(prompt) - 1 for row, prompt in prompts.items()}
        computed = {one.row: lengths[one.row] for one in given if one.source is None and lengths[one.row]}
        self.padding = [0 if row in prompts else padding for row, padding in enumerate(self.padding)]
        for chunk in in_chunks(computed, MOST_PROMPT_TOKENS):
            length = decoder.prefill(chunk, [prompts[row][:-1] for row in chunk])
            for row in chunk:
                self.padding[row] = length - computed[row]
        copied = [one for one in given if one.row not in computed]
        if copied:
            sources = [one.row if one.source is None else one.source for one in copied]
            decoder.copy(sources, [one.row for one in copied], [lengths[one.row] for one in copied])
        rows, requests = [one.row for one in given], [one.request for one in given]
        limits = {one.row: asked.limits[one.request] for one in given}
        states = [
            NOTHING._replace(tokens=prompt[-1], slots=lengths[row], limits=limits[row], has_ended=0)
            for row, prompt in prompts.items()
        ]
        noise_keys = _noise_keys(asked, requests, decoder.device) if asked.draws else None
        decoder.begin(rows, states, noise_keys)
        if self.stops is not None:
            self.stops.begin(rows, list(prompts.values()))
        for row, state in zip(rows, states, strict=True):
            self.states[row] = state

    def _move_together(self, num_rows: int) -> None:
        """Moves all answers into the first rows."""
        moves = self.rows.move_together(num_rows)
        if not moves:
            return
        sources, targets = [move.source for move in moves], [move.target for move in moves]
        lengths = [self.states[source].slots for source in sources]
        self.decoder.move(sources, targets, lengths, [len(self.rows.prompts[source] or ()) for source in sources])
        if self.stops is not None:
            self.stops.move(sources, targets)
        for source, target in moves:
            self.states[target], self.padding[target] = self.states[source], self.padding[source]

    def _take_steps(self, num_rows: int) -> None:
        """Goes on until the next look of the host, and takes what has ended."""
        live = self.rows.live()
        states = [self.states[row] for row in live]
        longest = max(state.limits - state.num_new_tokens for state in states)
        num_steps = min(CHECK_EVERY if self.loop.is_on_cuda else CHECK_EVERY_ON_CPU, longest)
        reach = max(state.slots for state in states) + 1
        with attention_for_decoding(self.decoder.model, self.decoder.cache):
            for number in range(num_steps):
                if self.loop.has_fixed_shapes:
                    self.loop.step(self.asked.kind, self.method, num_rows)()
                else:
                    self.decoder.step(self.method, num_rows, min(reach + number, self.decoder.cache_length))
        if self.stops is not None:
            self._note_stops(self.stops, num_rows, num_steps)
        self.states[:num_rows] = self.decoder.look(num_rows)
        self._harvest([row for row in live if self.states[row].has_ended and not self.states[row].had_ties])
        if any(self.states[row].had_ties for row in live):
            raise UnsuitableError("too many tokens tie with the last of the top_k")

    def _note_stops(self, stops: StopStrings, num_rows: int, num_steps: int) -> None:
        state = State(*(field[:num_rows] for field in self.decoder.fields))
        lengths = stops.lengths(self.decoder.output_ids[:num_rows], state.num_new_tokens, num_steps)
        state.stop_lengths.copy_(lengths)
        state.has_ended.bitwise_or_(lengths > 0)

    def _harvest(self, rows: list[int]) -> None:
        """Passes on the answers of rows, which are free from then on."""
        if not rows:
            return
        asked, states = self.asked, [self.states[row] for row in rows]
        outputs = self.decoder.answers(rows, max(state.num_new_tokens for state in states))
        answers = []
        for row, state, output_ids in zip(rows, states, outputs, strict=True):
            request = self.rows.requests[row]
            assert request is not None
            nan_length = None if state.nan_lengths < 0 else state.nan_lengths
            completion = finish(
                output_ids[: state.num_new_tokens],
                set(self.method.eos_ids),
                state.stop_lengths or None,
                nan_length,
                asked.limits[request],
            )
            padding, before = self.padding[row], self.rows.num_answered[row]
            answers.append((request, replace(completion, num_padding=padding, num_before=before)))
        self.rows.release(rows)
        if any(not state.has_ended for state in states):
            self.decoder.end(rows)
        asked.on_answers(answers)


def _noise_keys(asked: Asked, given: Sequence[int], device: torch.device) -> Tensor:
    """(N, T) int64: where the noise of N requests begins, for every position. (Of all at once it would take memory.)"""
    keys = torch.tensor([asked.requests[i].key for i in given], dtype=torch.int64, device=device)
    rows, completions = keys.T[:, :, None]  # (N, 1) each
    return stream_keys(asked.seed, rows, completions, torch.arange(max(asked.limits), device=device))
