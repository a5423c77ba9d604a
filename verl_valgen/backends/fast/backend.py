"""Chooses between our own decoding loop and Hugging Face's, for requests and models that ours cannot serve."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from verl_valgen.backends.base import UnsuitableError
from verl_valgen.backends.batching import Group
from verl_valgen.backends.fast.fused import unfuse
from verl_valgen.backends.fast.suitability import try_model, why_unsuitable
from verl_valgen.backends.hf import HFBackend
from verl_valgen.backends.padding import Sharing, next_batch
from verl_valgen.backends.trial import model_key
from verl_valgen.records import Completion, Request
from verl_valgen.text import describe

if TYPE_CHECKING:
    from verl_valgen.backends.fast.loop import DecodingLoop

logger = logging.getLogger(__name__)

_compile_failures: list[str] = []
"""Why torch.compile failed in this process. It is not tried again: it would fail every time, after half a minute."""


_failures: dict[tuple[str, str], str] = {}
"""Why our loop failed, by `model_key` and parameters, where Hugging Face's did not. It would fail in every round."""


class FastBackend(HFBackend):
    """Generates with `DecodingLoop` where it can, on CUDA with one graph launch per token."""

    refills_rows = True
    loop: DecodingLoop | None = None
    """Kept from one batch for the next."""
    uses_own_loop = False
    """Whether the batch of the moment runs in our loop."""
    unsuitable: str | None = None
    """Why Hugging Face's loop runs instead, None where ours does."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        try:
            return super().generate(requests)
        finally:
            self.release()

    def restore(self) -> None:
        unfuse(self.model)

    def prepare(self, requests: Sequence[Request], groups: Sequence[Group]) -> None:
        self.release()
        self.unsuitable = None
        cached = [group for group in groups if group.use_cache]
        if not cached:
            return  # `generate_batch` says why
        # The longest of all batches, so that one loop serves them; a multiple of 64, so that attention reads the mask
        # without a copy.
        longest = max(len(requests[group.indices[-1]].input_ids) + group.max_new_tokens for group in cached)
        self.cache_length = -(-longest // 64) * 64
        params = requests[groups[0].indices[0]].params
        self.unsuitable = why_unsuitable(self.model, params, self.cache_length) or self._earlier_failure(params)
        if self.unsuitable is None:
            may_fuse = self.limits.fuse and self.model.device.type == "cuda"
            self.unsuitable = try_model(self.model, requests, may_fuse=may_fuse).unsuitable
        if self.unsuitable is not None:
            unfuse(self.model)

    def _earlier_failure(self, params: Any) -> str | None:
        return _failures.get((model_key(self.model), repr(params)))

    def release(self) -> None:
        self.loop = None

    def sharing(self, requests: Sequence[Request]) -> Sharing:
        # The trial of our loop has a padded prompt.
        return Sharing.ANY_LENGTHS if self.unsuitable is None else super().sharing(requests)

    def generate_batch(self, requests: Sequence[Request], group: Group) -> list[Completion]:
        reason = self.unsuitable
        if reason is None and not group.use_cache:
            reason = "an answer crosses a length beyond which the rotary tables are others"
        if reason is not None:
            return self._in_hugging_faces_loop(requests, group, reason)
        try:
            self.uses_own_loop = True
            return self._generate_batch_compiled(requests, group)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # a class that we do not know may do anything with our cache
            traceback.clear_frames(e.__traceback__)
            is_known = isinstance(e, UnsuitableError)
            self.unsuitable = str(e) if is_known else describe(e)
        finally:
            self.uses_own_loop = False
        self.release()
        answers = self._in_hugging_faces_loop(requests, group, self.unsuitable)
        if not is_known:  # and what fails in both is the fault of the parameters
            _failures[model_key(self.model), repr(requests[0].params)] = self.unsuitable
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

    def _generate_batch_compiled(self, requests: Sequence[Request], group: Group) -> list[Completion]:
        """Returns the completions of one batch, generated with torch.compile if that is wanted and works."""
        try:
            return super().generate_batch(requests, group)
        except (UnsuitableError, torch.OutOfMemoryError):
            raise
        except Exception as e:
            if not self._compiles:
                raise
            _compile_failures.append(describe(e))
        logger.warning("generation.compile: going on without torch.compile, which failed: %s", _compile_failures[-1])
        self.release()
        return super().generate_batch(requests, group)

    @property
    def _compiles(self) -> bool:
        return self.limits.compile and not _compile_failures

    def call_generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        if not self.uses_own_loop:
            return super().call_generate(input_ids, **kwargs)
        from verl_valgen.backends.fast.loop import DecodingLoop

        if self.loop is None or self.loop.batch_size < len(input_ids):
            self.release()  # before the next one is allocated
            self.loop = DecodingLoop(self.model, len(input_ids), self.cache_length, compile=self._compiles)
        return super().call_generate(input_ids, custom_generate=self.loop, **kwargs)
