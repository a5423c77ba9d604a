"""Answers with vLLM's engine: requests in as token ids, answers out as token ids, one step after the other."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from verl_valgen.backends.base import Backend, Limits
from verl_valgen.backends.lengths import most_new_tokens
from verl_valgen.backends.vllm import versions
from verl_valgen.backends.vllm.answering import Growing, StopStrings
from verl_valgen.backends.vllm.loader import EngineLoader
from verl_valgen.backends.vllm.parameters import eos_ids_of, sampling_params, sampling_seeds
from verl_valgen.records import Completion, Request
from verl_valgen.text import describe, describe_at_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from verl_valgen.backends.vllm.engine import Engine

logger = logging.getLogger(__name__)

_STEPS_BETWEEN_CLOCKS = 8
"""Ranks that hold a model together must stop at the same step, and their clocks differ."""
_FEWEST_EMPTY = 8
"""Prompts are read once one of so many of the engine's places is empty. (On average half as many places are.)"""
_MOST_IDLE_STEPS = 1000
"""In so many no answer grows where vLLM waits for room that never comes. (Prompts are read in far fewer.)"""


class VLLMBackend(Backend):
    """Answers requests with the weights that an engine was given.

    Answers are vLLM's own: sampled ones are not those of other backends for the same seed, and may depend, by rounding,
    on what else is in the batch.

    Args:
        engine: Awake, with weights loaded, made for requests of this length.
    """

    loader = EngineLoader

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, seed: int, limits: Limits | None = None
    ) -> None:
        instead_of_model: Any = engine
        super().__init__(instead_of_model, tokenizer, seed, limits or Limits())
        self.engine = engine

    @classmethod
    def refills_rows(cls, requests: Sequence[Request]) -> bool:
        return True

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Backend.generate`. Collective over the ranks that hold the model together: all pass equal requests.

        Completions have `logprobs` where they are sampled, want a `mean_logprob`, or `limits.logprobs` says so.

        Raises:
            ValueError: The engine was made for shorter requests.
            Exception: The engine has failed, with whatever vLLM raises.
        """
        limits = [self._limit(request) for request in requests]
        with self.engine.in_force(), self.engine.failing_for_good():
            return self._generate(requests, limits)

    def _generate(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Completion]:
        vllm: Any = self.engine.llm_engine
        completions: list[Completion | None] = [None] * len(requests)
        growing: dict[str, tuple[int, Growing]] = {}
        seeds = sampling_seeds(self.seed, [request.key for request in requests]) if requests else []
        waiting = deque(range(len(requests)))
        stops, clock = StopStrings(self.tokenizer), Clock(self.limits.deadline)
        self.engine.num_calls += 1
        num_steps = num_idle = 0
        try:
            while (waiting or growing) and not (num_steps % _STEPS_BETWEEN_CLOCKS == 0 and clock.is_over()):
                for i in self._next(waiting, len(growing)):
                    name = f"{self.engine.num_calls}-{i}"
                    asked = self._ask(vllm, name, requests[i], limits[i], seeds[i])
                    if isinstance(asked, Completion):
                        completions[i] = asked
                        self.on_answers(1)
                    else:
                        growing[name] = (i, asked)
                if not growing:
                    continue
                num_steps += 1
                num_grown, ended = self._step(vllm, growing, stops)
                num_idle = 0 if num_grown else num_idle + 1
                if num_idle > _MOST_IDLE_STEPS:
                    raise RuntimeError(f"vLLM makes no progress with {len(growing)} requests")
                for i, answer in ended:
                    completions[i] = answer.completion()
        except BaseException:
            with suppress(Exception):
                _abort(vllm, growing)
            raise
        _abort(vllm, growing)
        for i, answer in growing.values():  # out of time
            completions[i] = answer.completion()
        self.on_answers(len(growing) + len(waiting))
        return [completion or Completion([], "time") for completion in completions]

    def _next(self, waiting: deque[int], num_growing: int) -> list[int]:
        """Takes the requests that vLLM is to have now.

        It would read a prompt whenever an answer ends, in most steps; and these run without a CUDA graph, several times
        as long. So places are left empty until there are some, for a step that reads several prompts.
        """
        num_places = self.engine.size.max_num_seqs
        num_empty = num_places - num_growing
        if num_empty < max(1, num_places // _FEWEST_EMPTY):
            return []
        return [waiting.popleft() for _ in range(min(num_empty, len(waiting)))]

    def _limit(self, request: Request) -> int:
        """The most new tokens of a request; see `most_new_tokens`."""
        limit = most_new_tokens(request, self.engine.config)
        if limit > 0 and len(request.input_ids) + limit > self.engine.size.max_model_len:
            raise ValueError(
                f"the engine was made for {self.engine.size.max_model_len} tokens, "
                f"and a request needs {len(request.input_ids)} + {limit}"
            )
        return limit

    def _ask(self, vllm: Any, name: str, request: Request, limit: int, seed: int) -> Completion | Growing:
        """Hands a request to vLLM; returns the answer that grows, or a completion where there is none to come."""
        if limit <= 0:
            return Completion([], "length")
        eos_ids = eos_ids_of(request, self.engine.generation_config.eos_token_id)
        try:
            params = sampling_params(request, limit, eos_ids, seed, logprobs=self.limits.logprobs)
            vllm.add_request(name, {"prompt_token_ids": list(request.input_ids)}, params)
        except Exception as e:  # vLLM checks parameters now, and its errors are of many kinds
            vllm.abort_request([name])
            logger.debug("these parameters failed: %s", describe_at_length(e))
            return Completion([], "error", error=describe(e))
        return Growing(request, eos_ids)

    def _step(
        self, vllm: Any, growing: dict[str, tuple[int, Growing]], stops: StopStrings
    ) -> tuple[int, list[tuple[int, Growing]]]:
        """Lets all answers grow by a step; takes those that end out of `growing`. Returns how many grew, and these."""
        grown: dict[str, tuple[int, Growing, int]] = {}
        for output in vllm.step():
            if output.request_id in growing:
                i, answer = growing[output.request_id]
                grown[output.request_id] = (i, answer, answer.extend(output.outputs[0]))
        unfinished = {id(answer) for _, answer, _ in grown.values() if answer.reason is None}
        stopped = {id(answer) for answer in stops.stop([(answer, num_new) for _, answer, num_new in grown.values()])}
        _abort(vllm, [name for name, (_, answer, _) in grown.items() if id(answer) in stopped & unfinished])
        ended = [(name, i, answer) for name, (i, answer, _) in grown.items() if answer.reason is not None]
        for name, _, _ in ended:
            del growing[name]
        if ended:
            self.on_answers(len(ended))
        return len(grown), [(i, answer) for _, i, answer in ended]


def _abort(vllm: Any, names: Iterable[str]) -> None:
    """Ends requests one after the other.

    Of several at once vLLM makes a set, and gives their blocks back in its order, another one on each rank. Ranks that
    hold a model together would then find other prompts' keys and values there, and run steps of different sizes.
    """
    for name in names:
        vllm.abort_request([name])


class Clock:
    """Says the same on all ranks that hold a model together. Collective over them, unless there is no deadline."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._group = versions.tensor_parallel_group()[0]

    def is_over(self) -> bool:
        """Whether the deadline has passed on any of them."""
        if self.deadline == math.inf:
            return False
        over = torch.tensor(time.time() > self.deadline, dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(over, op=dist.ReduceOp.MAX, group=self._group)
        return bool(over)
