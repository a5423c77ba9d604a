"""The end of a turn, as a chat template renders it behind what an assistant says.

Models are trained to end their answers with it. A base model's `generation_config` names the end of a document alone,
so that without it answers would go on into the next turn.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from verl_valgen.prompts.tokens import encode
from verl_valgen.text import describe

if TYPE_CHECKING:
    from verl_valgen.prompts.conversations import ChatTemplate

logger = logging.getLogger(__name__)

_CONTENT = "qwzcontentqwz"


class TurnEnd(NamedTuple):
    """What follows the content of an assistant's last turn."""

    text: str
    """Without white space around; "" where there is nothing else."""
    ids: tuple[int, ...] = ()
    """Its tokens."""
    token_id: int | None = None
    """The token that it is, if it is a single one, and one that the tokenizer never makes of ordinary text."""


def end_of_turn(template: ChatTemplate) -> TurnEnd:
    """The end of a turn by the template's rendering of one; `TurnEnd("")` where it renders none, or nothing."""
    for question, answer in (("?", _CONTENT), (_parts("?"), _parts(_CONTENT))):  # as some processors want them
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            _, found, rest = template.render(messages).rpartition(_CONTENT)
            ids = encode(template.tokenizer, rest.strip()) if rest.strip() else []
        except Exception as e:  # of every kind: a template is a program
            logger.debug("the chat template does not render a turn: %s", describe(e))
            continue
        if found:
            is_one = len(ids) == 1 and is_added(template.tokenizer, ids[0])
            return TurnEnd(rest.strip(), tuple(ids), ids[0] if is_one else None)
    return TurnEnd("")


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def is_added(tokenizer: Any, token_id: int) -> bool:
    """Whether a token lies beside the vocabulary of ordinary text, as special tokens do.

    An answer that ended with one that is a word or a mark would be cut off amid its text.
    """
    return token_id in getattr(tokenizer, "all_special_ids", ()) or token_id in getattr(
        tokenizer, "added_tokens_decoder", {}
    )
