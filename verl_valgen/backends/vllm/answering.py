"""Answers that grow step by step: their tokens, and why they end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import StopStringCriteria

from verl_valgen.records import Completion, FinishReason, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_TOKEN = 2**31 - 1
"""An id that transformers' criterion takes for a token of no stop string."""


@dataclass
class Growing:
    """An answer that is not complete yet."""

    request: Request
    eos_ids: Sequence[int]
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: FinishReason | None = None
    """None while it grows."""

    def extend(self, output: Any) -> int:
        """Takes what one step of vLLM says of it (`CompletionOutput`, with new tokens alone); returns their number."""
        token_ids = list(output.token_ids)
        self.output_ids += token_ids
        if (flat := output.logprobs) is not None:
            self.logprobs += [flat.logprobs[first] for first in flat.start_indices]  # the chosen token is the first
        if output.finish_reason is not None:
            # No stop strings are vLLM's to look for: it stops at tokens that end an answer.
            reasons: dict[str, FinishReason] = {"stop": "eos", "length": "length"}
            self.reason = reasons.get(str(output.finish_reason), "error")
        return len(token_ids)

    def stop_at(self, length: int) -> None:
        """Ends it with the token that completes a stop string."""
        del self.output_ids[length:], self.logprobs[length:]
        self.reason = "stop"

    def completion(self) -> Completion:
        """What has come of it. One that has not ended was out of time."""
        values = self.logprobs
        mean = math.fsum(values) / len(values) if self.request.wants_logprob and values else None
        return Completion(
            self.output_ids,
            self.reason or "time",
            mean_logprob=mean,
            error="vLLM gave it up" if self.reason == "error" else "",
            had_nan=any(map(math.isnan, values)),
            logprobs=values if len(values) == len(self.output_ids) else None,
        )


class StopStrings:
    """Finds the tokens that complete transformers' stop strings, which vLLM itself finds only with a tokenizer.

    Equal on all ranks that hold a model together, as tokens are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._criteria: dict[tuple[str, ...], StopStringCriteria] = {}

    def stop(self, grown: Sequence[tuple[Growing, int]]) -> list[Growing]:
        """Ends answers that have just grown, by so many tokens each, where a stop string is complete; returns them.

        One that ends with an end-of-sequence token at that place ends by that.
        """
        by_strings: dict[tuple[str, ...], list[tuple[Growing, int]]] = {}
        for answer, num_new in grown:
            if strings := answer.request.params.get("stop_strings"):
                by_strings.setdefault((strings,) if isinstance(strings, str) else tuple(strings), []).append(
                    (answer, num_new)
                )
        stopped = []
        for strings, answers in by_strings.items():
            places = [
                (answer, length)
                for answer, num_new in answers
                for length in range(len(answer.output_ids) - num_new + 1, len(answer.output_ids) + 1)
            ]
            for (answer, length), is_stopped in zip(places, self._complete(strings, places), strict=True):
                ends_so = answer.reason == "eos" and length == len(answer.output_ids)
                if is_stopped and answer not in stopped and not ends_so:
                    answer.stop_at(length)
                    stopped.append(answer)
        return stopped

    def _complete(self, strings: tuple[str, ...], places: Sequence[tuple[Growing, int]]) -> list[bool]:
        """Whether the token at each length completes one of the strings."""
        if not places:
            return []
        if strings not in self._criteria:
            self._criteria[strings] = StopStringCriteria(self.tokenizer, list(strings))
        criterion = self._criteria[strings]
        width = criterion.maximum_token_len  # of what it looks at
        ends = []
        for answer, length in places:
            ids = answer.output_ids[max(0, length - width) : length]
            if len(ids) < width:  # a stop string may begin in the prompt
                ids = answer.request.input_ids[-(width - len(ids)) :] + ids
            ends.append([_NO_TOKEN] * (width - len(ids)) + ids)
        return criterion(torch.tensor(ends), None).tolist()  # type: ignore[arg-type]
