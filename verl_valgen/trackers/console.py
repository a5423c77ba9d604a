"""Samples on the terminal, between the lines of verl's progress bar.

One block per round, and a line that sums it up. Text is cut and made printable: a model's output must not move the
cursor or recolour the screen.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from verl_valgen.records import DEFAULT_STRATEGY, Sample
from verl_valgen.scores.names import ALWAYS, DERIVED
from verl_valgen.text import printable
from verl_valgen.trackers.base import Tracker

_RULE = "-" * 50

_ABOUT_THE_ROUND = ("num_samples", "seconds", "tokens_per_s", "best", "best_step")
_MAX_SUMMARY_CHARS = 2000


class ConsoleTracker(Tracker):
    """Prints prompt and generation of every sample to the standard output of the moment."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        lines = [f"=== Validation Samples (Step {step}) ==="]
        of_prompts: dict[int, list[Sample]] = {}
        for sample in samples:
            of_prompts.setdefault(sample.index, []).append(sample)
        for index, of_prompt in of_prompts.items():
            lines.append(f"Prompt {index + 1}: {printable(of_prompt[0].prompt_text, self._max_chars)}")
            for sample in of_prompt:
                label = _label(sample, of_prompt)
                lines.append(f"Generation {index + 1}{label}: {printable(sample.generation, self._max_chars)}")
            lines.append(_RULE)
        _write("\n".join(lines))

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        """One line that sums up the round; numbers by source of data are left to the trackers."""
        _write(printable(_summary(scalars, step), _MAX_SUMMARY_CHARS))


def _write(text: str) -> None:
    """In one call: the bar is taken away and drawn again around it."""
    from tqdm import tqdm  # verl's own dependency, and its class: only that one knows verl's progress bar

    tqdm.write(_encodable(text))
    sys.stdout.flush()


def _label(sample: Sample, of_prompt: Sequence[Sample]) -> str:
    """What tells a completion from the others of its prompt: strategy, number."""
    has_strategies = len({other.strategy for other in of_prompt}) > 1 or sample.strategy != DEFAULT_STRATEGY
    has_numbers = any(other.completion for other in of_prompt if other.strategy == sample.strategy)
    parts = [sample.strategy] * has_strategies + [str(sample.completion + 1)] * has_numbers
    return f" ({printable(', '.join(parts))})" if parts else ""


def _summary(scalars: dict[str, float], step: int) -> str:
    """What fits a line: of metrics the mean, by strategy where there are several."""
    values = {key.removeprefix("val/gen/"): value for key, value in scalars.items()}
    derived = {key for key in values if (match := DERIVED.fullmatch(key)) and match[1] in values}
    shown = {key: _number(value) for key, value in values.items() if key not in derived}
    by_strategy: dict[str, list[str]] = {}
    for key, number in shown.items():
        strategy, separator, name = key.partition("/")
        if separator and strategy != "by_source" and name not in ALWAYS:
            by_strategy.setdefault(strategy, []).append(f"{name} {number}")
    kept = [f"{key} {number}" for key, number in shown.items() if key in ALWAYS or (not by_strategy and "/" not in key)]
    kept = [text for text in kept if text.partition(" ")[0] not in _ABOUT_THE_ROUND]
    parts = [", ".join(kept), *(f"{name}: {', '.join(numbers)}" for name, numbers in by_strategy.items())]
    # In front, for the line is cut where strategies and metrics are many.
    if shown.keys() >= {"best", "best_step"}:
        parts.insert(0, "best {best} at step {best_step}".format_map(shown))
    if shown.keys() >= {"num_samples", "seconds", "tokens_per_s"}:
        parts.insert(0, "{num_samples} samples in {seconds} s, {tokens_per_s} tokens/s".format_map(shown))
    return f"Step {step}: {'; '.join(filter(None, parts))}"


def _number(value: float) -> str:
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


def _encodable(text: str) -> str:
    # Under an ASCII or Latin-1 locale one foreign letter would cost the whole block.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)
