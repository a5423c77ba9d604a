"""Samples on the terminal, between the lines of verl's progress bar.

One block per round, and a line that sums it up. Text is cut and made printable: a model's output must not move the
cursor or recolour the screen.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from verl_valgen.records import DEFAULT_STRATEGY, Round, RoundNumbers, Sample
from verl_valgen.text import printable
from verl_valgen.trackers.base import Tracker

if TYPE_CHECKING:
    from verl_valgen.settings.settings import GenerationSettings

_RULE = "-" * 50

_MAX_SUMMARY_CHARS = 2000


class ConsoleTracker(Tracker):
    """Prints prompt and generation of every sample, and a summary, to the current standard output."""

    def __init__(self, settings: GenerationSettings) -> None:
        self._max_chars = settings.max_log_chars

    def log(self, round: Round) -> None:
        _write("\n".join(self._block(round)))
        _write(printable(_summary(round.numbers, round.step), _MAX_SUMMARY_CHARS))

    def _block(self, round: Round) -> list[str]:
        lines = [f"=== Validation Samples (Step {round.step}) ==="]
        by_prompt: dict[int, list[Sample]] = {}
        for sample in round.samples:
            by_prompt.setdefault(sample.index, []).append(sample)
        for index, samples in by_prompt.items():
            lines.append(f"Prompt {index + 1}: {printable(samples[0].prompt_text, self._max_chars)}")
            for sample in samples:
                generation = printable(sample.generation, self._max_chars)
                lines.append(f"Generation {index + 1}{_label(sample, samples)}: {generation}")
            lines.append(_RULE)
        return lines


def _write(text: str) -> None:
    """Writes in one call, around which the progress bar is taken away and drawn again."""
    from tqdm import tqdm  # verl's own dependency, and its class: only that one knows verl's progress bar

    tqdm.write(_encodable(text))
    sys.stdout.flush()


def _label(sample: Sample, siblings: Sequence[Sample]) -> str:
    """Strategy and number, as far as they tell a completion from the others of its prompt."""
    has_strategies = len({other.strategy for other in siblings}) > 1 or sample.strategy != DEFAULT_STRATEGY
    has_numbers = any(other.completion for other in siblings if other.strategy == sample.strategy)
    parts = [sample.strategy] * has_strategies + [str(sample.completion + 1)] * has_numbers
    return f" ({printable(', '.join(parts))})" if parts else ""


def _summary(numbers: RoundNumbers, step: int) -> str:
    """One line about a round: of metrics the mean, by strategy where strategies are named.

    What comes first matters most: the line is cut where strategies and metrics are many.
    """
    parts = [
        f"{_number(numbers.num_samples)} samples in {_number(numbers.seconds)} s, "
        f"{_number(numbers.tokens_per_s)} tokens/s"
    ]
    if numbers.best is not None:
        parts.append(f"best {_number(numbers.best.value)} at step {_number(numbers.best.step)}")
    by_strategy = {name: group.scores for name, group in numbers.by_strategy.items() if group.scores}
    overall = numbers.overall
    parts.append(_listed(overall.always if by_strategy else {**overall.always, **overall.scores}))
    parts += [f"{name}: {_listed(scores)}" for name, scores in by_strategy.items()]
    return f"Step {step}: {'; '.join(filter(None, parts))}"


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in values.items())


def _number(value: float) -> str:
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


def _encodable(text: str) -> str:
    # Under an ASCII or Latin-1 locale one foreign letter would cost the whole block.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)
