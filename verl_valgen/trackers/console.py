"""Samples on the terminal, between the lines of verl's progress bar.

One block per round. Text is cut and made printable: a model's output must not move the cursor or recolour the screen.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from verl_valgen.samples import Sample
from verl_valgen.text import printable
from verl_valgen.trackers.base import Tracker

_RULE = "-" * 50


class ConsoleTracker(Tracker):
    """Prints prompt and generation of every sample to the standard output of the moment."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        from tqdm import tqdm  # verl's own dependency, and its class: only that one knows verl's progress bar

        lines = [f"=== Validation Samples (Step {step}) ==="]
        for sample in samples:
            lines.append(f"Prompt {sample.index + 1}: {printable(sample.prompt_text, self._max_chars)}")
            lines.append(f"Generation {sample.index + 1}: {printable(sample.generation, self._max_chars)}")
            lines.append(_RULE)
        # In one call: the bar is taken away and drawn again around it.
        tqdm.write(_encodable("\n".join(lines)))
        sys.stdout.flush()

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Nothing: numbers are for the trackers."""


def _encodable(text: str) -> str:
    # Under an ASCII or Latin-1 locale one foreign letter would cost the whole block.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)
