"""The sum of log-probabilities by which beam search has chosen an answer: observed in the loop, and compared.

transformers reports it only together with the scores of the whole vocabulary at every step. This module knows
transformers' beam search; it knows no ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitNormalization, LogitsProcessor, LogitsProcessorList

from verl_valgen.backends.judging import processed
from verl_valgen.records import Request


class _Step(NamedTuple):
    """The beams before one token, on the host; B sequences of K beams, T tokens so far."""

    ids: Tensor  # (B, K, T) int32
    totals: Tensor  # (B, K) sums of log-probabilities
    best: Tensor  # (B, K, C) log-probabilities of the likeliest next tokens
    best_ids: Tensor  # (B, K, C)


class BeamObserver(LogitsProcessor):
    """Notes the log-probabilities that beam search adds up, and leaves them as they are. To be the last processor.

    Args:
        num_sequences: B.
        num_eos: The number of ids that end a sequence: transformers looks at more candidates where there are more.
    """

    def __init__(self, num_sequences: int, num_eos: int) -> None:
        self.num_sequences, self.num_eos = num_sequences, num_eos
        self.prompt_length = 0
        self.steps: list[_Step] = []
        self.scores: Tensor | None = None  # (B, K, V), of the step before

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids = input_ids.view(self.num_sequences, -1, input_ids.shape[1])  # (B, K, L)
        log_probs = scores.view(*ids.shape[:2], -1)
        if self.scores is None:
            self.prompt_length = ids.shape[2]
            totals = torch.zeros(ids.shape[:2])
        else:
            totals = self._totals(ids[:, :, self.prompt_length :].to("cpu", torch.int32), self.scores)
        # transformers takes so many of all beams' tokens, so that no row gives more.
        num_candidates = min(max(2, 1 + self.num_eos) * ids.shape[1], log_probs.shape[-1])
        best, best_ids = log_probs.topk(num_candidates)
        new = ids[:, :, self.prompt_length :].to("cpu", torch.int32)
        self.steps.append(_Step(new, totals, best.float().cpu(), best_ids.cpu()))
        self.scores = log_probs.clone()
        return scores

    def _totals(self, ids: Tensor, scores: Tensor) -> Tensor:
        """The sums of the beams `ids`, (B, K, T), each of which goes on from one of the step before."""
        before = self.steps[-1]
        goes_on = (ids[:, :, None, :-1] == before.ids[:, None]).all(-1)  # (B, K, K)
        parent = goes_on.int().argmax(-1)  # (B, K)
        batch = torch.arange(len(ids))[:, None]
        device = scores.device
        added = scores[batch.to(device), parent.to(device), ids[..., -1].long().to(device)].float().cpu()
        return before.totals.gather(1, parent) + added

    def sums(self, answers: Sequence[Sequence[int]]) -> list[float | None]:
        """The sum of the log-probabilities of each answer's tokens; None where an answer is no beam that was seen.

        Args:
            answers: B lists of new tokens, those that end a sequence included, without padding.
        """
        return [self._sum(i, list(answer)) for i, answer in enumerate(answers)]

    def _sum(self, i: int, answer: list[int]) -> float | None:
        if not 0 < len(answer) <= len(self.steps):
            return None
        step = self.steps[len(answer) - 1]
        for row, ids in enumerate(step.ids[i].tolist()):
            if ids == answer[:-1] and answer[-1] in (best_ids := step.best_ids[i, row].tolist()):
                return float(step.totals[i, row] + step.best[i, row, best_ids.index(answer[-1])])
        return None


def beam_objection(
    logits: Tensor, request: Request, output_ids: Sequence[int], observed: float, processors: LogitsProcessorList
) -> str | None:
    """Why an answer's sum of log-probabilities is not what the reader's model gives, if it isn't.

    Args:
        logits: (T, V), the reader's at the positions before the answer's tokens.
        output_ids: The answer, T tokens.
        observed: The sum in the loop.
        processors: What transformers makes of the request's parameters; in beam search it sees log-probabilities.

    Returns:
        None where the sums agree; else a phrase with numbers.
    """
    chosen = torch.tensor(output_ids, device=logits.device)
    # transformers normalizes behind the processor that observes.
    processors = LogitsProcessorList(p for p in processors if not isinstance(p, LogitNormalization))
    log_probs = processed(logits.float().log_softmax(-1), 0, request, output_ids, processors)
    total = log_probs.gather(1, chosen[:, None]).sum().item()
    num_tokens = len(output_ids)
    # Rounding adds up like a random walk, and a little more.
    if abs(total - observed) <= 0.3 * math.sqrt(num_tokens) + 0.05 * num_tokens:
        return None
    return f"beam search adds up {observed:.2f} for {num_tokens} tokens, the trainer's model {total:.2f}"
