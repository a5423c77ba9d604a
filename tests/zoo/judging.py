"""Whether tokens are what a model says: judged by its own forward pass, teacher-forced, without cache or padding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from verl_valgen.backends.sampling import GumbelNoise, logits_warpers
from verl_valgen.records import Completion, Request

TOLERANCE = 0.01
"""How far below the best a chosen token may lie in float32, in standard deviations of the logits."""


class Judgement(NamedTuple):
    """How tokens compare with what a model says."""

    num_tokens: int
    num_wrong: int
    """Tokens with a gap above the tolerance."""
    gap: float
    """The largest distance of a chosen token to the best, in standard deviations of the logits."""

    def __add__(self, other: Judgement) -> Judgement:  # type: ignore[override]
        return Judgement(self.num_tokens + other.num_tokens, self.num_wrong + other.num_wrong, max(self.gap, other.gap))

    def __str__(self) -> str:
        return f"{self.num_wrong} of {self.num_tokens} tokens, gap {self.gap:.2g}"


@torch.no_grad()
def read(model: Any, ids: Sequence[int]) -> Tensor:
    """Returns the (N, V) float32 logits of one forward pass over N tokens, without cache and padding."""
    parameters = inspect.signature(model.forward).parameters
    no_cache = {"use_cache": False} if "use_cache" in parameters or "kwargs" in parameters else {}
    output = model(input_ids=torch.tensor([list(ids)]), **no_cache)
    return output.logits[0, -len(ids) :].float()


def read_by_prefixes(model: Any, prompt: Sequence[int], chosen: Sequence[int]) -> Tensor:
    """Returns the (T, V) float32 logits for T tokens behind a prompt, each read behind those before it alone."""
    return torch.stack([read(model, [*prompt, *chosen[:length]])[-1] for length in range(len(chosen))])


def relative_gap(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of (N, V) logits, in standard deviations of the expected ones; infinite with NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    gap = (actual - expected).abs().max() / expected.std()
    return gap.item() if gap.isfinite() else float("inf")


def judge(logits: Tensor, chosen: Sequence[int], request: Request, seed: int) -> Judgement:
    """Judges T chosen tokens by the (T, V) logits that a model has for their positions.

    Sampled tokens are judged after the request's warpers and the same noise.
    """
    scores = logits.clone()
    if request.params["do_sample"]:
        device = scores.device
        noise = GumbelNoise(seed, [request.key], 0, len(chosen), device)
        warpers = logits_warpers(request.params, device)
        rows = []
        for position, row in enumerate(scores):
            row = warpers(torch.zeros(1, 1, dtype=torch.int64), row[None])
            rows.append(noise(torch.zeros(1, position, dtype=torch.int64), row)[0])
        scores = torch.stack(rows)
    best = scores.max(-1).values
    gaps = (best - scores.gather(1, torch.tensor(chosen)[:, None])[:, 0]) / logits.std(-1)
    gaps = torch.where(gaps.isnan(), torch.inf, gaps)
    return Judgement(len(chosen), int((gaps > TOLERANCE).sum()), gaps.max().item())


def judge_all(
    reader: PreTrainedModel, requests: Sequence[Request], completions: Sequence[Completion], seed: int = 0
) -> Judgement:
    """Judges answers by the model that reads them.

    Raises:
        RuntimeError: An answer is missing; the message is the backend's.
    """
    total = Judgement(0, 0, 0.0)
    for request, completion in zip(requests, completions, strict=True):
        if completion.finish_reason == "error" or not completion.output_ids:
            raise RuntimeError(completion.error or f"no answer: {completion.finish_reason}")
        prompt, chosen = request.input_ids, completion.output_ids
        judgement = judge(read(reader, [*prompt, *chosen])[-len(chosen) - 1 : -1], chosen, request, seed)
        if judgement.num_wrong:  # some rotary tables depend on the length, so that what is said depends on what follows
            by_prefixes = judge(read_by_prefixes(reader, prompt, chosen), chosen, request, seed)
            judgement = min(judgement, by_prefixes, key=lambda one: one.num_wrong)
        total += judgement
    return total
