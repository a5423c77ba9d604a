"""Chooses between our own decoding loop and Hugging Face's, for requests and models that ours cannot serve.

(Over 200 lines, as what fails in our loop goes on in Hugging Face's: the ways from one to the other are read together.)
"""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from verl_valgen.backends.base import UnsuitableError
from verl_valgen.backends.batching import Group, group_requests, kind_of, refilled_groups
from verl_valgen.backends.fast.choice import CAPTURABLE
from verl_valgen.backends.fast.fused import is_fused, unfuse
from verl_valgen.backends.fast.suitability import try_model, why_unsuitable
from verl_valgen.backends.hf import WITHOUT_PROCESSORS, HFBackend
from verl_valgen.backends.lengths import MOST_IN_A_BATCH, ROW_MULTIPLE, most_new_tokens
from verl_valgen.backends.observers import NanObserver
from verl_valgen.backends.padding import Sharing, left_pad, next_batch
from verl_valgen.backends.sampling import GumbelNoise, logits_warpers
from verl_valgen.backends.trial import model_key
from verl_valgen.collectives import attempt
from verl_valgen.records import Completion, Request
from verl_valgen.text import describe

if TYPE_CHECKING:
    from verl_valgen.backends.fast.loop import Asked, DecodingLoop

logger = logging.getLogger(__name__)

T = TypeVar("T")

_compile_failures: list[str] = []
"""Why torch.compile failed in this process. It is not tried again: it would fail every time, after half a minute."""


_failures: dict[tuple[str, str], str] = {}
"""Why our loop failed, by `model_key` and parameters, where Hugging Face's did not. It would fail in every round."""

_IN_A_STEP = (WITHOUT_PROCESSORS | {"renormalize_logits", "remove_invalid_values"}) - {"max_time"}
"""Parameters of which a step can hold all. (`max_time` is that of a batch.)"""


def is_refillable(params: Mapping[str, Any]) -> bool:
    """Whether requests with these parameters may take rows from which others have gone."""
    warpers = logits_warpers(params, torch.device("cpu")) if params["do_sample"] else []
    return params.keys() <= _IN_A_STEP and all(isinstance(warper, CAPTURABLE) for warper in warpers)


class FastBackend(HFBackend):
    """Generates with `DecodingLoop` where it can, on CUDA with one graph launch per token."""

    most_in_a_batch = MOST_IN_A_BATCH
    loop: DecodingLoop | None = None
    """Kept from one kind of parameters for the next."""
    uses_own_loop = False
    """Whether the batch of the moment runs in our loop."""
    unsuitable: str | None = None
    """Why Hugging Face's loop runs instead, None where ours does."""
    is_ready = False
    """Whether `make_ready` has captured what `generate` needs, which then captures nothing."""

    @classmethod
    def refills_rows(cls, requests: Sequence[Request]) -> bool:
        by_kind = {repr(one.params): one.params for one in requests}
        # What transformers refuses is no refusal of the whole round.
        return all(attempt(partial(is_refillable, params))[0] for params in by_kind.values())

    def make_ready(self, requests: Sequence[Request]) -> None:
        self._begin(requests)
        kinds = group_requests(requests, self.model.config)
        while True:
            try:
                num_failures = len(_compile_failures)
                for groups in kinds:
                    self._make_kind_ready(requests, groups)
                if len(_compile_failures) == num_failures:  # else the graphs of the kinds before are gone
                    break
            except torch.OutOfMemoryError as e:
                if not self._halve(min(self.batch_size, self._most_requests), e):
                    raise
        if self.loop is not None:
            self.loop.seal()
        self.is_ready = True

    def _make_kind_ready(self, requests: Sequence[Request], groups: Sequence[Group]) -> None:
        """Tries the model, and captures what a kind of requests needs."""
        _, error = attempt(partial(self._capture, requests, groups))
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        if error is not None:
            self.unsuitable = str(error) if isinstance(error, UnsuitableError) else describe(error)
        if self.unsuitable is not None:
            self._reasons[kind_of(requests[groups[0].indices[0]])] = self.unsuitable
            super().sharing(requests)

    def _capture(self, requests: Sequence[Request], groups: Sequence[Group]) -> None:
        from verl_valgen.backends.fast.loop import Run

        self.prepare(requests, groups)
        cached = [group for group in groups if group.use_cache and group.max_new_tokens > 0]
        if self.unsuitable is not None or not cached:
            return
        if not is_refillable(requests[cached[0].indices[0]].params):
            self._compiling_if_it_works(self._capture_batch)
            return
        for indices in refilled_groups(requests, cached, self.model.config):
            asked = self._asked(requests, indices, None)
            self._run(lambda asked=asked: Run(self._own_loop(), asked, captures_only=True), asked)

    def _capture_batch(self) -> None:
        from verl_valgen.backends.fast.step import Method

        loop = self._own_loop()
        loop.capture("", Method(None, (), 0), [min(loop.num_rows, self._batch_rows)])

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        try:
            if not self.is_ready:
                self._begin(requests)
            return super().generate(requests)
        finally:
            self.is_ready = False
            self.release()

    def restore(self) -> None:
        unfuse(self.model)

    def _begin(self, requests: Sequence[Request]) -> None:
        """Notes how large the rows must be for all kinds of requests, so that one loop serves them."""
        self.release()
        self._reasons: dict[str, str] = {}  # why kinds are unsuitable, as found by `make_ready`
        self.most_at_once = self.limits.batch_size
        self._most_requests, self._cache_length, self._max_new_tokens = 1, 64, 1
        for groups in group_requests(requests, self.model.config):
            cached = [group for group in groups if group.use_cache]
            reason, error = attempt(partial(self._why_unsuitable, requests, cached))
            if cached and error is None and reason is None:
                self._most_requests = max(self._most_requests, sum(len(group.indices) for group in cached))
                self._cache_length = max(self._cache_length, _cache_length(requests, cached))
                self._max_new_tokens = max(self._max_new_tokens, *(group.max_new_tokens for group in cached))

    def _why_unsuitable(self, requests: Sequence[Request], cached: Sequence[Group]) -> str | None:
        """Why our loop is not even tried for a kind of requests."""
        if not cached:
            return None  # `generate_batch` says why
        params = requests[cached[0].indices[0]].params
        earlier = _failures and _failures.get((model_key(self.model), repr(params)))
        return why_unsuitable(self.model, params, _cache_length(requests, cached)) or earlier or None

    def prepare(self, requests: Sequence[Request], groups: Sequence[Group]) -> None:
        cached = [group for group in groups if group.use_cache]
        found = self._reasons.get(kind_of(requests[groups[0].indices[0]]))
        self.unsuitable = found or self._why_unsuitable(requests, cached)
        if cached and self.unsuitable is None:
            self._batch_rows = min(max(len(group.indices) for group in cached), self.most_in_a_batch)
            may_fuse = self.limits.fuse and self.model.device.type == "cuda"
            self.unsuitable = try_model(self.model, requests, may_fuse=may_fuse).unsuitable
        if self.unsuitable is not None:
            unfuse(self.model)

    def release(self) -> None:
        self.loop = None

    def _own_loop(self) -> DecodingLoop:
        from verl_valgen.backends.fast.loop import DecodingLoop

        if self.loop is None or self.loop.num_rows > self.batch_size:
            self.release()  # before the next one is allocated
            num_rows = min(self.batch_size, self._most_requests)
            self.loop = DecodingLoop(
                self.model,
                num_rows,
                self._cache_length,
                self._max_new_tokens,
                compile=self._compiles,
                captures=not self.is_ready,
                key=(model_key(self.model), is_fused(self.model)),
            )
        return self.loop

    def sharing(self, requests: Sequence[Request]) -> Sharing:
        # The trial of our loop has prompts of different lengths.
        return Sharing.ANY_LENGTHS if self.unsuitable is None else super().sharing(requests)

    # Rows that are refilled

    def generate_groups(
        self, requests: Sequence[Request], groups: Sequence[Group], completions: list[Completion]
    ) -> None:
        params, failure = requests[groups[0].indices[0]].params, None
        if self.unsuitable is None and is_refillable(params):
            answered: set[int] = set()
            for indices in refilled_groups(requests, groups, self.model.config):
                failure = failure or self._generate_refilled(requests, indices, completions, answered)
            groups = [group._replace(indices=[i for i in group.indices if i not in answered]) for group in groups]
            if self.loop is not None and not self.is_ready:
                self.loop.forget_steps()
        super().generate_groups(requests, groups, completions)
        # What fails in both loops is the fault of the parameters.
        if failure is not None and time.time() <= self.limits.deadline:
            _failures[model_key(self.model), repr(params)] = failure

    def _generate_refilled(
        self, requests: Sequence[Request], indices: list[int], completions: list[Completion], answered: set[int]
    ) -> str | None:
        """Fills in the completions of requests whose parameters are equal, as far as our loop serves them.

        Returns:
            What went wrong, where nobody knew that it could.
        """
        from verl_valgen.backends.fast.loop import Run

        lacking: list[int] = []  # answers whose log-probability was not to be had beside the rows

        def take(answers: list[tuple[int, Completion]]) -> None:
            for i, answer in answers:
                with_logprob = self._with_logprob(requests[i], answer) if requests[i].wants_logprob else answer
                if with_logprob is None:
                    lacking.append(i)
                completions[i] = with_logprob or answer
                answered.add(i)
            self.on_answers(len(answers))

        failure = None
        while (todo := [i for i in indices if i not in answered]) and time.time() <= self.limits.deadline:
            asked = self._asked(requests, todo, take)
            try:
                self._run(lambda asked=asked: Run(self._own_loop(), asked), asked)
                break
            except torch.OutOfMemoryError as e:
                if not self._halve(min(self.batch_size, len(todo)), e):
                    raise
            except Exception as e:  # a class that we do not know may do anything with our cache
                failure = self._give_up(e)
                break
        if lacking and not self.is_ready:
            self.release()
        for i in lacking:
            (completions[i],) = self.with_logprobs([requests[i]], [completions[i]])
        return failure

    def _with_logprob(self, request: Request, answer: Completion) -> Completion | None:
        """Adds the log-probability, as answers come so that time limits hold; None where there is no memory for it."""
        try:
            return self.with_logprobs([request], [answer])[0]
        except torch.OutOfMemoryError as e:
            traceback.clear_frames(e.__traceback__)
            return None

    def _give_up(self, error: Exception) -> str | None:
        """Our loop has failed: Hugging Face's goes on. Returns why, where nobody knew that it could."""
        traceback.clear_frames(error.__traceback__)
        is_known = isinstance(error, UnsuitableError)
        self.unsuitable = str(error) if is_known else describe(error)
        if not self.is_ready:  # else other kinds have their graphs there
            self.release()
        return None if is_known else self.unsuitable

    def _halve(self, num_rows: int, error: torch.OutOfMemoryError) -> bool:
        """Goes on with half as many rows after running out of memory; False if there was one."""
        if num_rows == 1:
            return False
        self.most_at_once = math.ceil(num_rows / 2)
        logger.debug("out of memory with %d prompts at once: going on with %d", num_rows, self.most_at_once)
        traceback.clear_frames(error.__traceback__)  # they hold what was allocated
        self.release()
        return True

    def _asked(self, requests: Sequence[Request], indices: list[int], take: Any) -> Asked:
        from verl_valgen.backends.fast.loop import Asked

        asked = [requests[i] for i in indices]
        params, stops = asked[0].params, asked[0].params.get("stop_strings")
        return Asked(
            kind=repr(sorted(params.items())),
            requests=asked,
            limits=[most_new_tokens(request, self.model.config) for request in asked],
            seed=self.seed,
            draws=params["do_sample"],
            stops=StopStringCriteria(self.tokenizer, stops) if stops else None,
            deadline=self.limits.deadline,
            on_answers=lambda answers: take([(indices[place], answer) for place, answer in answers]),
        )

    def _run(self, make_run: Any, asked: Asked) -> None:
        """Enters `generate` for a run of our loop, with torch.compile if that is wanted and works."""
        self._compiling_if_it_works(lambda: self._enter(make_run(), asked))

    def _compiling_if_it_works(self, call: Callable[[], T]) -> T:
        """Calls what may use torch.compile, a second time without it where it has failed."""
        try:
            return call()
        except (UnsuitableError, torch.OutOfMemoryError):
            raise
        except Exception as e:
            self._note_compile_failure(e)
            return call()

    def _enter(self, run: Any, asked: Asked) -> None:
        first, device = asked.requests[0], self.model.device
        processors = LogitsProcessorList()
        if asked.draws:
            processors += logits_warpers(first.params, device)
            processors.append(GumbelNoise(self.seed, [first.key], len(first.input_ids), 1, device))
        processors.append(NanObserver(1))
        input_ids, attention_mask = left_pad([first.input_ids], device)
        self.call_generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=self._generation_config(first.params, asked.limits[0]),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList(),
            custom_generate=run,
        )

    def _note_compile_failure(self, error: Exception) -> None:
        """Remembers that compiling fails; raises what has failed if nothing was compiled."""
        if not self._compiles:
            raise error
        _compile_failures.append(describe(error))
        logger.warning("generation.compile: going on without torch.compile, which failed: %s", _compile_failures[-1])
        self.release()

    @property
    def _compiles(self) -> bool:
        return self.limits.compile and not _compile_failures and not self.is_ready

    # Batches that begin together

    def generate_batch(self, requests: Sequence[Request], group: Group) -> list[Completion]:
        reason = self.unsuitable
        if reason is None and not group.use_cache:
            reason = "an answer crosses a length beyond which the rotary tables are others"
        if reason is not None:
            return self._in_hugging_faces_loop(requests, group, reason)
        try:
            self.uses_own_loop = True
            generate_batch = super().generate_batch
            return self._compiling_if_it_works(lambda: generate_batch(requests, group))
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # a class that we do not know may do anything with our cache
            failure = self._give_up(e)
        finally:
            self.uses_own_loop = False
        assert self.unsuitable is not None
        answers = self._in_hugging_faces_loop(requests, group, self.unsuitable)
        if failure is not None:  # and what fails in both is the fault of the parameters
            _failures[model_key(self.model), repr(requests[0].params)] = failure
        return answers

    def _in_hugging_faces_loop(self, requests: Sequence[Request], group: Group, reason: str) -> list[Completion]:
        """Answers a batch of ours with the model as it came, in smaller batches where prompts must be apart."""
        logger.debug("Hugging Face's loop: %s", reason)
        unfuse(self.model)
        answers: list[Completion] = []
        while len(answers) < len(requests):
            rest = list(range(len(answers), len(requests)))
            if len(rest) > 1:
                rest = next_batch(requests, rest, len(rest), super().sharing(requests))
            answers += super().generate_batch([requests[i] for i in rest], group)
        return answers

    def call_generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        if not self.uses_own_loop:
            return super().call_generate(input_ids, **kwargs)
        from verl_valgen.backends.fast.together import Batch

        loop = self._own_loop()
        batch = Batch(loop, min(loop.num_rows, self._batch_rows))
        return super().call_generate(input_ids, custom_generate=batch, **kwargs)


def _cache_length(requests: Sequence[Request], groups: Sequence[Group]) -> int:
    """The most tokens of a prompt and its answer, as a multiple: attention then reads a mask without a copy."""
    longest = max(len(requests[group.indices[-1]].input_ids) + group.max_new_tokens for group in groups)
    return math.ceil(longest / ROW_MULTIPLE) * ROW_MULTIPLE
