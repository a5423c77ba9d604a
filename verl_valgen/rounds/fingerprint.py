"""A short text that tells whether two runs ask the same: by it a resumed run knows that its prompts are others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from verl_valgen.records import Prompt


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """The same for the same prompts with the same expected answers, in whatever order and from whatever rows."""
    digests = sorted(_digest(prompt) for prompt in prompts)
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _digest(prompt: Prompt) -> str:
    given = prompt.source or prompt.input_ids  # a template may make other tokens of the same every day
    asked = json.dumps([given, prompt.reference, prompt.data.ground_truth], default=str, sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()
