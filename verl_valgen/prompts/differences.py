"""In what way a row's prompt and data are not what verl trains of it, in words, and the warning that says so.

This module knows tokens and texts; `trained.py` knows which of them are trained.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from verl_valgen.prompts.reasoning import KNOWN_ENDS
from verl_valgen.prompts.tokens import Decoder, encode
from verl_valgen.records import Prompt
from verl_valgen.text import printable

logger = logging.getLogger(__name__)

_MOST_LISTED = 10
"""Number of rows that a warning names."""

# The ways in which prompt or data are not what is trained, as the warning has them.
REASONING_IS_LOST = "the reasoning in the data is not trained"
ANSWER_IS_CUT = "the answer is cut off at data.max_length"
TEMPLATE_ADDS = "the chat template adds to the answer in the data"
ANSWER_DIFFERS = "the answer in the data is trained as another text"
NOT_TRAINED = "the answer is not trained"
THINK_BLOCK_IS_UNTRAINED = "an empty think block is asked for and never trained"
PROMPT_ASKS_FOR_MORE = "the prompt ends in more than what is trained"
USER_TURN_IS_LOST = "a user turn is lost, as a whole or in part"
PROMPT_DIFFERS = "the prompt is trained as another text"
TOKENS_DIFFER = "the prompt is trained as the same text in other tokens"


def difference_of_answers(said: str, trained: str, reasoning: str, decoder: Decoder, *, is_cut: bool) -> str:
    """In what way what is trained is not what the data says; "" where it is that.

    Args:
        reasoning: The reasoning that the data has apart from the answer, "" without any.
        is_cut: Whether tokens may be missing at the end of what is trained.
    """
    # White space is the template's. And a tokenizer without a token for a character is no matter of training.
    as_tokens = decoder.answer(encode(decoder.tokenizer, said))
    if _without_space(trained) in (_without_space(said), _without_space(as_tokens)):
        return ""
    if not trained:
        return NOT_TRAINED
    if is_cut and _without_space(as_tokens).startswith(_without_space(trained)):
        return ANSWER_IS_CUT
    if reasoning not in trained or any(mark in said and mark not in trained for mark in KNOWN_ENDS):
        return REASONING_IS_LOST
    return TEMPLATE_ADDS if said in trained else ANSWER_DIFFERS


def _without_space(text: str) -> str:
    return "".join(text.split())


def difference_of_prompts(
    prompt_ids: list[int], before: list[int], users: Sequence[str], decoder: Decoder, *, is_cut: bool
) -> tuple[str, ...]:
    """In what way a prompt is not what is trained before the answer; () where it is that, or has what was cut off.

    Args:
        before: The tokens that training has before the answer.
        users: What the users say, stripped.
        is_cut: Whether tokens are missing at the beginning of `before`.
    """
    if prompt_ids[-len(before) if is_cut and before else 0 :] == before:
        return ()
    asked, trained = decoder.whole(prompt_ids), decoder.whole(before)
    if asked == trained:
        return (TOKENS_DIFFER,)
    if any(user in asked and user not in trained for user in users):
        return (USER_TURN_IS_LOST,)
    if asked.startswith(trained):
        more = asked[len(trained) :]
        return (THINK_BLOCK_IS_UNTRAINED if any(mark in more for mark in KNOWN_ENDS) else PROMPT_ASKS_FOR_MORE,)
    return (PROMPT_DIFFERS,)


def warn_of_differences(prompts: Sequence[Prompt]) -> None:
    """One warning about the rows whose prompt or data is not what is trained, if there are any."""
    rows: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        for difference in prompt.differences:
            rows.setdefault(difference, []).append(prompt)
    if rows:
        texts = [f"{difference} ({listed_rows(found)})" for difference, found in rows.items()]
        logger.warning(
            "validation data and training differ: %s; the samples have what is trained as `reference`, and what the "
            "data says as `reference_text`",
            "; ".join(texts),
        )


def listed_rows(prompts: Sequence[Prompt]) -> str:
    """The rows of prompts with their files, as far as there are several; not all of very many."""
    rows = list(dict.fromkeys((prompt.file, prompt.row) for prompt in prompts))
    by_file: dict[str | None, list[str]] = {}
    for file, row in rows[:_MOST_LISTED]:
        by_file.setdefault(file, []).append(str(row))
    texts = [
        f"row{'s' if len(own) > 1 else ''} {', '.join(own)}" + (f" of {printable(file, 200)}" if file else "")
        for file, own in by_file.items()
    ]
    more = [f"{len(rows) - _MOST_LISTED} more"] if len(rows) > _MOST_LISTED else []
    return " and ".join([*texts, *more])
