"""The records that travel: prompts and queries in, requests and completions through a backend, samples and rounds out.

This module owns their fields, and the order of the fields in a JSONL line; they stay in one file, as they are read
together. It knows neither models nor trackers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

FinishReason = Literal["eos", "stop", "length", "time", "error"]
"""Why an answer ended. "error" is never recorded: a request that failed gives no sample."""

DEFAULT_STRATEGY = "default"
"""The strategy's name where none is configured."""

RECORD_FORMAT = 1
"""What the record's `format` is now. It is raised where a field goes, or changes its name or meaning, so that a reader
can tell; a field that is new does not raise it. Records without it are from before there was one."""


@dataclass(frozen=True)
class RowData:
    """The columns of a data row that are looked at, as plain Python."""

    data_source: str | None = None
    ground_truth: Any = None
    """The truth that verl's reward functions compare with: `reward_model.ground_truth`, or the column of that name."""
    extra_info: Any = None
    params: Any = None
    """The cell of `generation.params_key`, not parsed yet."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that is ready to be answered."""

    row: int | None
    """Row of the validation data's file (of the data set, while it is read); None where the prompt is not from one."""
    input_ids: list[int]
    """The model's input, up to and including the generation prompt; no padding."""
    text: str
    """The prompt for a person to read: the last user message, or all of it without special tokens."""
    reference: str | None
    """The expected answer, stripped: what is trained, as far as that is known. Without beginnings, ends and padding;
    other special tokens stay. None if there is none."""
    data: RowData = field(default_factory=RowData)
    stream: int | None = None
    """Stands for the row in sampling, where there is none or it is not unique; in [0, 2**32)."""
    file: str | None = None
    """The file that `row` is of, where the data has several."""
    own_place: str | None = None
    """Where a prompt that is no row of the validation data comes from, in words: `prompts.jsonl line 3`."""
    not_shown: str = field(default="", compare=False)
    """What the model is given beside `text`, in words: `2 turns, 3 tools`."""
    reference_raw: str | None = None
    """All tokens that are trained as text, special ones too, where that is another text than the reference; else
    None."""
    reference_text: str | None = None
    """What the data says, stripped, where it is not what is trained; else None."""
    differences: tuple[str, ...] = ()
    """In what way prompt or data are not what is trained, in words."""
    source: str = field(default="", compare=False)
    """Stands for what the template was given: the same on every day. "" where no template was given anything."""


@dataclass(frozen=True)
class Query:
    """One prompt under one strategy."""

    index: int
    """0-based position of the prompt in the round."""
    prompt: Prompt
    strategy: str
    params: Mapping[str, Any]
    """The `transformers.GenerationConfig` fields in force."""
    num_completions: int
    best_of: int
    """Number of candidates from which each completion is chosen."""


def origin(prompt: Prompt) -> str | None:
    """Where a prompt comes from, in words: its row, or the line of a file; None where that is not known."""
    if prompt.row is None:
        return prompt.own_place
    return f"row {prompt.row}" if prompt.file is None else f"row {prompt.row} of {prompt.file}"


@dataclass(frozen=True)
class Request:
    """One sequence that a backend is asked to complete."""

    input_ids: list[int]
    key: tuple[int, int]
    """(row, completion): with the seed and the position it determines every sampled token."""
    params: Mapping[str, Any]
    """`transformers.GenerationConfig` fields, checked. The model's own defaults do not leak in."""
    wants_logprob: bool = False
    """Whether the completion must report its mean log-probability."""


@dataclass(frozen=True)
class Completion:
    """A backend's answer to one `Request`."""

    output_ids: list[int]
    """New tokens, the end-of-sequence token included."""
    finish_reason: FinishReason
    mean_logprob: float | None = None
    """Mean log-probability of the new tokens, in nats, before any logits processor; None unless it was asked for."""
    error: str = ""
    """Why there is no answer, where the reason is "error"."""
    had_nan: bool = False
    """Whether a token was chosen by scores with NaN among them: then the answer is meaningless."""
    sum_logprob: float | None = field(default=None, compare=False)
    """Sum of the log-probabilities by which beam search has chosen it, in nats; None for other answers."""
    logprobs: Sequence[float] | None = field(default=None, compare=False)
    """Log-probability of each new token, in nats, before any logits processor; None where the backend does not give
    them."""
    num_padding: int = field(default=0, compare=False)
    """Padding tokens beside the prompt, in the batch that it was read in: nothing of the answer depends on it."""
    num_before: int = field(default=0, compare=False)
    """Answers given before in its row of the cache, where rows are refilled: nothing of it depends on them."""


class ProvenAnswers(NamedTuple):
    """The answers of a round, and whether they are the model's own."""

    completions: Sequence[Completion]
    """One per request, in their order."""
    verified: bool | None
    """Whether they passed the check against the trainer's model; None: they were not checked."""
    dtype: str
    """The dtype that they were computed in, as torch names it."""
    deadline: float
    """`time.time()` at which whatever is made of them must be done; infinity: no limit of the round's own."""


WITHHELD = "(withheld: failed the check against the trainer's model)"
"""Stands for an answer that is not the model's own, everywhere but in the JSONL files."""


@dataclass(frozen=True)
class Answer:
    """A completion with the query that it answers: paired once, where completions come back, and carried to the end."""

    query: Query
    number: int
    """0-based number among the query's completions."""
    completion: Completion


class Verdict(NamedTuple):
    """One metric's judgement of one sample."""

    scores: dict[str, float]
    is_correctness: bool | None
    """See `Metric.is_correctness`."""
    vote: str
    """See `Metric.vote`."""
    texts: dict[str, str] = {}  # noqa: RUF012  (never written to)
    """Texts that a function returned beside numbers, by name: the answer that it extracted, say."""


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt, as it is recorded. The order of the fields is the order in the JSONL file."""

    format: int = field(default=RECORD_FORMAT, kw_only=True)
    """See `RECORD_FORMAT`."""
    step: int
    index: int
    """0-based position of the prompt in the round."""
    row: int | None
    """Row of the validation data's file; None where the prompt does not come from it."""
    file: str | None = field(default=None, kw_only=True)
    """The file that `row` is of, where the data has several."""
    origin: str | None = field(default=None, kw_only=True)
    """Where the prompt comes from and what `prompt_text` does not show, in words: `row 6, 2 turns, 3 tools`."""
    strategy: str
    completion: int
    """0-based number among the completions of the same prompt."""
    prompt: str
    """The prompt decoded with special tokens: exactly what the model was given."""
    prompt_text: str
    generation: str
    """The answer without beginnings, ends and padding, and, where `generation.reasoning` says so, without reasoning."""
    generation_raw: str | None = field(default=None, kw_only=True)
    """The whole answer, all special tokens included, where that is another text; else None."""
    reference: str | None
    """The expected answer, likewise; stripped."""
    reference_raw: str | None = field(default=None, kw_only=True)
    """All that is trained, special tokens included, where that is another text than the reference; else None."""
    reference_text: str | None = field(default=None, kw_only=True)
    """What the data says, where that is not what is trained; else None."""
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_new_tokens: int
    """Number of new tokens, the end-of-sequence token included."""
    seed: int
    params: dict[str, Any] = field(default_factory=dict)
    """The generation parameters that were in force, `dtype` included."""
    scores: dict[str, float | None] = field(default_factory=dict)
    data_source: str | None = None
    ground_truth: Any = None
    """The row's ground truth, which reward functions compare with; None if there is none. Recorded as a text: what is
    none, as JSON."""
    score_texts: dict[str, str] = field(default_factory=dict)
    """The texts that metrics returned beside their scores, such as the answer that a reward function extracted."""
    verified: bool | None = None
    """Whether the answers of the round passed the check against the trainer's model; None: they were not checked."""

    # Not recorded: for metrics, and for the numbers of the round.
    output_ids: Sequence[int] = ()
    whole_generation: str | None = None
    """The answer with its reasoning, for functions with verl's signature; None where `generation` has all of it."""
    extra_info: Any = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """Each metric's judgement, by the metric's name."""

    def shown(self) -> Sample:
        """The sample for people to see: without its answer, if that failed the check."""
        if self.verified is not False:
            return self
        nothing: dict[str, Any] = {"generation_raw": None, "whole_generation": None, "output_ids": ()}
        return replace(self, generation=WITHHELD, scores={}, score_texts={}, verdicts={}, **nothing)

    def to_dict(self) -> dict[str, Any]:
        """The record, in the order of the fields."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_RECORDED}
        if not isinstance(self.ground_truth, str | None):  # a table's column has one type
            record["ground_truth"] = json.dumps(self.ground_truth, ensure_ascii=False)
        return record


_NOT_RECORDED = ("output_ids", "whole_generation", "extra_info", "verdicts")


@dataclass(frozen=True)
class GroupNumbers:
    """The numbers of one group of samples: all of a round, those of a strategy, those of a data source. All finite."""

    always: Mapping[str, float] = field(default_factory=dict)
    """Numbers that need no metric: `scores.names.ALWAYS`."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Mean of each score that a metric gives."""
    derived: Mapping[str, float] = field(default_factory=dict)
    """What n completions of a prompt give for scores that are 0 or 1: `<score>_pass_at_<n>`, `<score>_majority`."""
    further: Mapping[str, float] = field(default_factory=dict)
    """What is logged with `generation.aggregates=all` alone: `<score>_best`, `<score>_pass_at_1`, `distinct_2`, ..."""


class BestValue(NamedTuple):
    """A value of the metric that is watched, and the step of its round."""

    value: float
    step: int


@dataclass(frozen=True)
class RoundNumbers:
    """The numbers of a round."""

    num_samples: int
    seconds: float
    """How long the answers took."""
    tokens_per_s: float
    overall: GroupNumbers = field(default_factory=GroupNumbers)
    """Of all answers where no strategies are configured. Else empty: it would mix greedy answers with sampled ones."""
    by_strategy: Mapping[str, GroupNumbers] = field(default_factory=dict)
    """Empty where no strategies are configured."""
    by_source: Mapping[str, GroupNumbers] = field(default_factory=dict)
    """Of the first strategy's answers, by the rows' `data_source` as part of a key that every tracker takes."""
    best: BestValue | None = None
    """The best value so far of `generation.best_metric`."""
    logs_all: bool = False
    """Whether all numbers are logged, or those that most people watch: `generation.aggregates`."""

    def flat(self) -> dict[str, float]:
        """The numbers that are logged, under the trackers' keys without `val/gen/`."""
        return self.all() if self.logs_all else self._flat(["always", "scores", "derived"], ["scores"])

    def all(self) -> dict[str, float]:
        """All numbers, under the same keys, whether they are logged or not."""
        kinds = [kind.name for kind in fields(GroupNumbers)]
        return self._flat(kinds, kinds)

    def _flat(self, kinds: Sequence[str], of_sources: Sequence[str]) -> dict[str, float]:
        """
        Args:
            kinds: The fields of `GroupNumbers` that are wanted.
            of_sources: Those that are wanted of data sources.
        """
        groups = [("", self.overall, kinds)]
        groups += [(f"{name}/", group, kinds) for name, group in self.by_strategy.items()]
        groups += [(f"by_source/{name}/", group, of_sources) for name, group in self.by_source.items()]
        numbers = {"num_samples": float(self.num_samples), "seconds": self.seconds, "tokens_per_s": self.tokens_per_s}
        for prefix, group, wanted in groups:
            for kind in wanted:
                numbers |= {f"{prefix}{name}": value for name, value in getattr(group, kind).items()}
        if self.best is not None:
            numbers |= {"best": self.best.value, "best_step": float(self.best.step)}
        return numbers


@dataclass(frozen=True)
class Round:
    """A finished round, as a tracker gets it."""

    step: int
    samples: Sequence[Sample]
    """With their scores, prompt by prompt."""
    numbers: RoundNumbers

    def shown(self) -> Round:
        """The round for people to see: without answers that failed the check."""
        return replace(self, samples=[sample.shown() for sample in self.samples])


def pack(requests: Sequence[Request]) -> dict[str, Any]:
    """Requests for JSON; parameters, which many share, are written once."""
    kinds: dict[str, int] = {}
    kind_by_request = [kinds.setdefault(json.dumps(request.params, sort_keys=True), len(kinds)) for request in requests]
    return {
        "params": list(kinds),
        "requests": [
            [request.input_ids, request.key, kind, request.wants_logprob]
            for request, kind in zip(requests, kind_by_request, strict=True)
        ],
    }


def unpack(packed: dict[str, Any]) -> list[Request]:
    """The requests that `pack` was given, after a way through JSON."""
    params = [json.loads(text) for text in packed["params"]]
    return [
        Request(input_ids, (row, completion), params[kind], wants_logprob)
        for input_ids, (row, completion), kind, wants_logprob in packed["requests"]
    ]
