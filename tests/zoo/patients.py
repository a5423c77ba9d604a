"""A model under examination: the source that stands for the trainer's, the prompts that it gets, and copies of it."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from zoo.configurations import variant
from zoo.judging import Judgement, judge_all, read
from zoo.sources import source_model

from verl_valgen.backends.judging import EXACT, objection, shortfalls
from verl_valgen.records import Completion, Request
from verl_valgen.weights.gather import gather

SEED = 3
GREEDY = {"do_sample": False, "max_new_tokens": 12}
SAMPLING = {"do_sample": True, "max_new_tokens": 12, "temperature": 1.0, "top_k": 20}
PROMPT_LENGTHS = (3, 12, 20, 30)
"""Below, across and above the windows, chunks and contexts of the variants, which are 8 to 16 tokens."""

SAME = 1e-3
"""How far the logits of two float32 models, or of two bfloat16 ones, may differ, in standard deviations."""


class Patient:
    """A model under examination."""

    distinct = 0
    """Number of different tokens in each answer of `generate`, added up: few say little."""

    def __init__(self, name: str) -> None:
        self.passes: dict[str, bool] = {}
        """Check -> whether all its answers were judged right."""
        self.answers: dict[str, list[Completion]] = {}
        """Way -> its answers to `requests`; those that an exception prevented are missing."""
        self.source = source_model(name)
        self.attention, self.adapter = variant(name).attention, variant(name).adapter
        generator = torch.Generator().manual_seed(2)
        self.requests = [
            Request(torch.randint(3, 90, (length,), generator=generator).tolist(), (row, 0), GREEDY)
            for row, length in enumerate(PROMPT_LENGTHS)
        ]
        self.sampled = [replace(request, params=SAMPLING) for request in self.requests]

    def copy(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The copy that a round would answer with."""
        model = gather(self.source, dtype=dtype, device=torch.device("cpu"), keep=True)
        assert model is not None
        model.generation_config = GenerationConfig(**self.source.generation_config.to_diff_dict())
        return model

    @functools.cached_property
    def loaded(self) -> dict[torch.dtype, PreTrainedModel]:
        """What `from_pretrained` makes of the saved source, in float32 and in bfloat16."""
        with tempfile.TemporaryDirectory() as directory:
            copy.deepcopy(self.source).save_pretrained(directory)  # which writes to the configuration
            extra = {} if self.attention is None else {"attn_implementation": self.attention}
            return {
                dtype: type(self.source).from_pretrained(directory, dtype=dtype, **extra).eval()
                for dtype in (torch.float32, torch.bfloat16)
            }

    def judge(self, requests: Sequence[Request], completions: Sequence[Completion]) -> Judgement:
        return judge_all(self.source, requests, completions, SEED)

    def objection(self, request: Request, completion: Completion) -> str | None:
        """What a round's net has against an answer."""
        chosen = completion.output_ids
        logits = read(self.source, [*request.input_ids, *chosen])[-len(chosen) - 1 : -1]
        return objection(shortfalls(logits, request, chosen, SEED, LogitsProcessorList()), EXACT)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]
