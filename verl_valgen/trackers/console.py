"""Samples on the terminal, between the lines of verl's progress bar.

A block per round, and what sums it up (`summary.py`). Text is cut and made printable: a model's output must not move
the cursor, recolour the screen, or begin a line that looks like one of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice

from verl_valgen.records import DEFAULT_STRATEGY, Round, Sample
from verl_valgen.text import printable
from verl_valgen.trackers.base import TrackedRun, Tracker
from verl_valgen.trackers.summary import summary
from verl_valgen.viewing.beside_bars import width, write_lines
from verl_valgen.viewing.folder import step_file
from verl_valgen.viewing.wording import ENDINGS, number

_RULE = "-" * 50

_MAX_LINE_CHARS = 2000
"""A line of scores is cut after so many characters."""


class ConsoleTracker(Tracker):
    """Prints rounds to the current standard output, as much of them as `generation.console` says."""

    def __init__(self, run: TrackedRun) -> None:
        self._settings, self._directory = run.settings, run.directory

    def log(self, round: Round) -> None:
        console = self._settings.console
        if console == "none":
            return
        lines = [] if console == "brief" else list(self._block(round, is_full=console == "full"))
        lines += summary(round.numbers, round.step, width(sys.stdout), self._settings.best_metric)
        write_lines("\n".join(lines))

    def _block(self, round: Round, *, is_full: bool) -> Iterator[str]:
        yield f"=== Validation Samples (Step {round.step}) ==="
        by_prompt: dict[int, list[Sample]] = {}
        for sample in round.samples:
            by_prompt.setdefault(sample.index, []).append(sample)
        num_shown = 0
        for samples in islice(by_prompt.values(), self._settings.console_prompts):
            firsts: dict[str, Sample] = {}
            for sample in samples:
                firsts.setdefault(sample.strategy, sample)
            num_shown += len(firsts)
            yield from self._of_prompt([*firsts.values()], samples, is_full=is_full)
            yield _RULE
        if num_left_out := len(round.samples) - num_shown:
            yield f"... {num_left_out} more in {printable(str(step_file(self._directory, round.step)))}"

    def _of_prompt(self, shown: Sequence[Sample], samples: Sequence[Sample], *, is_full: bool) -> Iterator[str]:
        """The lines of one prompt.

        Args:
            shown: Of its answers those that are shown.
            samples: All of its answers.
        """
        first, max_chars = samples[0], self._settings.max_log_chars
        i = first.index + 1
        labels = [_label(sample, samples) for sample in shown]
        yield f"Prompt {i}: {printable(first.prompt_text, max_chars)}"
        for sample, label in zip(shown, labels, strict=True):
            yield f"Generation {i}{label}: {printable(sample.generation, max_chars)}"
        if not is_full:
            return
        if first.reference is not None:
            yield f"Expected {i}: {printable(first.reference, max_chars)}"
        for sample, label in zip(shown, labels, strict=True):
            if judged := _judged(sample):
                yield f"Scores {i}{label}: {printable(judged, _MAX_LINE_CHARS)}"
        if first.origin is not None:
            yield f"Source {i}: {printable(first.origin, max_chars)}"


def _judged(sample: Sample) -> str:
    """The scores of an answer, whether it is empty, and why it ended, if there is something to say."""
    if sample.verified is False:
        return ""  # the answer is not the model's own
    scores = [f"{name} {number(score)}" for name, score in sample.scores.items() if score is not None]
    is_empty = "empty" if not sample.generation.strip() else ""
    return "; ".join(filter(None, [", ".join(scores), is_empty, ENDINGS.get(sample.finish_reason, "")]))


def _label(sample: Sample, siblings: Sequence[Sample]) -> str:
    """Strategy and number, as far as they tell a completion from the others of its prompt."""
    has_strategies = len({other.strategy for other in siblings}) > 1 or sample.strategy != DEFAULT_STRATEGY
    has_numbers = any(other.completion for other in siblings if other.strategy == sample.strategy)
    parts = [sample.strategy] * has_strategies + [str(sample.completion + 1)] * has_numbers
    return f" ({printable(', '.join(parts))})" if parts else ""
