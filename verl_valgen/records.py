"""The records that travel: a `Request` to a backend, a `Completion` back, a `Sample` on to the trackers.

This module owns their fields and their order in a JSONL line. It knows neither models nor trackers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

FinishReason = Literal["eos", "stop", "length", "time", "error"]
"""The last is never recorded: a request that failed gives no sample."""

DEFAULT_STRATEGY = "default"
"""The name of the only one where none is configured."""


@dataclass(frozen=True)
class RowData:
    """The columns that are looked at, as plain Python."""

    data_source: str | None = None
    ground_truth: Any = None
    """What verl's reward functions compare with: `reward_model.ground_truth`, or the column of that name."""
    extra_info: Any = None
    params: Any = None
    """Of `generation.params_key`, as it stands there."""


@dataclass(frozen=True)
class Prompt:
    """One row of the validation data, ready to be answered."""

    row: int | None
    """Row of the data set; None where the prompt does not come from one."""
    input_ids: list[int]
    """What the model is given, up to and including the generation prompt; no padding."""
    text: str
    """What a person reads: the last user message, or the prompt without special tokens."""
    reference: str | None
    """The expected answer without special tokens, stripped; None if there is none."""
    data: RowData = field(default_factory=RowData)
    stream: int = 0
    """Stands for the row in sampling, where there is none."""


@dataclass(frozen=True)
class Request:
    """What a backend is asked to complete."""

    input_ids: list[int]
    key: tuple[int, int]
    """(row, completion): with the seed and the position it determines every sampled token."""
    params: Mapping[str, Any]
    """`transformers.GenerationConfig` fields, checked. The model's own defaults do not leak in."""
    wants_logprob: bool = False
    """Whether the completion is to say how likely it is."""


@dataclass(frozen=True)
class Completion:
    """What a backend answers to one `Request`."""

    output_ids: list[int]
    """New tokens, the end-of-sequence token included."""
    finish_reason: FinishReason
    mean_logprob: float | None = None
    """Of the new tokens, as the model has it before any logits processor, in nats; where it was asked for."""
    error: str = ""
    """Why there is no answer, where the reason is "error"."""
    had_nan: bool = False
    """Whether there was NaN among the scores that a token was chosen by, which so says nothing."""


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt, as it is recorded. The order of the fields is the order in the JSONL file."""

    step: int
    index: int
    """0-based place in the round."""
    row: int | None
    strategy: str
    completion: int
    """0-based number among the completions of the same prompt."""
    prompt: str
    """Decoded with special tokens: exactly what the model was given."""
    prompt_text: str
    generation: str
    """Decoded without special tokens."""
    reference: str | None
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_new_tokens: int
    """The end-of-sequence token is counted."""
    seed: int
    params: dict[str, Any] = field(default_factory=dict)
    """The generation parameters that were in force, `dtype` included."""
    scores: dict[str, float | None] = field(default_factory=dict)
    data_source: str | None = None

    # Not recorded: for metrics.
    output_ids: Sequence[int] = ()
    ground_truth: Any = None
    extra_info: Any = None

    def to_dict(self) -> dict[str, Any]:
        """The record, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_RECORDED}


_NOT_RECORDED = ("output_ids", "ground_truth", "extra_info")


def pack(requests: Sequence[Request]) -> dict[str, Any]:
    """Requests for JSON; parameters, which many share, once."""
    kinds: dict[str, int] = {}
    of_requests = [kinds.setdefault(json.dumps(request.params, sort_keys=True), len(kinds)) for request in requests]
    return {
        "params": list(kinds),
        "requests": [
            [request.input_ids, request.key, kind, request.wants_logprob]
            for request, kind in zip(requests, of_requests, strict=True)
        ],
    }


def unpack(packed: dict[str, Any]) -> list[Request]:
    """What `pack` made, after a way through JSON."""
    params = [json.loads(text) for text in packed["params"]]
    return [
        Request(input_ids, (row, completion), params[kind], wants_logprob)
        for input_ids, (row, completion), kind, wants_logprob in packed["requests"]
    ]
