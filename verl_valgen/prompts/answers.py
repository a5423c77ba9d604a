"""What is shown of an answer and of its reference: without the end, and with reasoning or without.

This module knows tokens and texts; it does not know which settings say what is shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from verl_valgen.prompts.reasoning import after_reasoning
from verl_valgen.prompts.tokens import Decoder
from verl_valgen.records import Completion, Prompt

_TAIL = 64
"""Number of the prompt's last tokens in which a reasoning that it closes itself is looked for."""


class AnswerTexts(NamedTuple):
    """The texts of one answer."""

    generation: str
    raw: str | None
    """All tokens as text, where that is another one than `generation`."""
    whole: str | None
    """`generation` with its reasoning, where that is another text."""


class ReferenceTexts(NamedTuple):
    """The texts of what is expected."""

    reference: str | None
    raw: str | None
    """All that is trained as text, where that is another one than `reference`."""


@dataclass(frozen=True)
class AnswerReader:
    """Reads answers and references as a run shows them."""

    decoder: Decoder
    reasoning_end: str = ""
    """The text that ends reasoning, which is left out then; "" keeps it."""
    wants_ground_truth: bool = False
    """Whether the reference is the row's ground truth, in place of what is trained."""

    def prompt(self, prompt: Prompt) -> str:
        """Exactly what the model is given."""
        return self.decoder.whole(prompt.input_ids)

    def answer(self, prompt_ids: Sequence[int], completion: Completion) -> AnswerTexts:
        """Without reasoning, an answer whose reasoning has no end is empty, unless the prompt itself has ended it."""
        ids = completion.output_ids
        # A token that the user calls the end may be an ordinary one.
        said = ids[:-1] if completion.finish_reason == "eos" else ids
        whole = generation = self.decoder.answer(said, prompt_ids)
        if self.reasoning_end:
            answer = after_reasoning(whole, self.reasoning_end)
            generation = (whole if self._is_closed(prompt_ids) else "") if answer is None else answer
        raw = self.decoder.whole(ids, prompt_ids)
        return AnswerTexts(generation, _if_other(raw, generation), _if_other(whole, generation))

    def _is_closed(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt ends the reasoning itself."""
        return self.decoder.whole(prompt_ids[-_TAIL:]).rstrip().endswith(self.reasoning_end)

    def is_lost(self, prompt: Prompt) -> bool:
        """Whether an answer that is the reference, word for word, would count as empty."""
        if not (self.reasoning_end and prompt.reference):
            return False
        return after_reasoning(prompt.reference, self.reasoning_end) is None and not self._is_closed(prompt.input_ids)

    def reference(self, prompt: Prompt) -> ReferenceTexts:
        """A reference without the end of a reasoning is whole: nothing shows that it has any."""
        trained = prompt.reference
        if self.wants_ground_truth and (prompt.row is not None or prompt.data.ground_truth is not None):
            shown = _as_text(prompt.data.ground_truth)
        elif trained is not None and self.reasoning_end:
            answer = after_reasoning(trained, self.reasoning_end)
            shown = trained if answer is None else answer
        else:
            shown = trained
        raw = trained if prompt.reference_raw is None else prompt.reference_raw
        return ReferenceTexts(shown, _if_other(raw, shown))


def _if_other(text: str | None, shown: str | None) -> str | None:
    return None if text == shown else text


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
