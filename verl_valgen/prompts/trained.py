"""What verl trains of a row, by the item of its data set, and in what way prompt and data are not that.

A chat template may render a turn in one way alone and in another within a conversation, and verl's versions tokenize
turn by turn in ways of their own: which answer is trained, behind which prompt, stands in the item alone. This module
knows items, tokens and texts; `datasets.py` knows where a row's conversation comes from.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from verl_valgen.prompts.conversations import ChatTemplate, Message, readable
from verl_valgen.prompts.masks import answer_spans, trained_texts, without_padding
from verl_valgen.prompts.reasoning import KNOWN_ENDS, reasoning_of
from verl_valgen.prompts.tokens import Decoder, encode
from verl_valgen.records import Prompt
from verl_valgen.text import describe

logger = logging.getLogger(__name__)

_OVERLAP = 8
"""Number of tokens by which prompt and item are recognised as the same at the beginning of an answer."""

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


@dataclass(frozen=True)
class Item:
    """An item of verl's data set, without padding."""

    ids: list[int]
    mask: list[bool]
    """The loss mask."""
    is_cut_left: bool
    """Whether tokens may be missing at the beginning, where it is as long as allowed; else at the end."""
    is_full: bool
    """Whether it is as long as `data.max_length` allows, so that tokens may be missing."""


def read_item(dataset: Any, row: int) -> Item | None:
    """The item of a row of verl's data set; None, with a line at DEBUG, where it cannot be read.

    That training will fail there, and verl says why, is no reason to have no prompt.
    """
    try:
        item = dataset[row]
        ids, mask = without_padding(item["input_ids"], item.get("attention_mask"), item["loss_mask"])
        assert mask is not None, "a loss mask was given"
        is_cut_left = dataset.truncation == "left" and getattr(dataset, "pad_mode", None) != "no_padding"
        return Item(ids, mask, is_cut_left, len(ids) >= dataset.max_length)
    except Exception as e:
        logger.debug("row %d: what is trained is not known, as its item cannot be read: %s", row, describe(e))
        return None


def as_single_turn_is_trained(prompt: Prompt, item: Item, decoder: Decoder) -> Prompt:
    """`prompt` of verl's `SFTDataset` with the reference that is trained.

    `truncation=left` makes the data set's mask begin too late: there the text of the data stays.
    """
    spans = answer_spans(item.mask, len(item.ids), shifted=True)
    num_prompt = len(prompt.input_ids)
    if not spans or item.ids[:num_prompt] != prompt.input_ids or (item.is_full and item.is_cut_left):
        return prompt
    return _with_reference(prompt, item, (num_prompt, spans[-1][1]), decoder, said=prompt.reference or "", reasoning="")


def as_turn_is_trained(
    prompt: Prompt, item: Item, messages: Sequence[Message], turn: int, template: ChatTemplate
) -> Prompt:
    """`prompt`, which asks for `messages[turn]`, with the reference that is trained and all differences.

    Where it cannot be told which tokens of the item are that turn, the text of the data stays.
    """
    span = _span_of_turn(prompt.input_ids, item, messages, turn)
    decoder = template.decoder
    if span is None:
        return prompt
    if span[0] == span[1]:
        return replace(prompt, differences=(NOT_TRAINED,))
    said, reasoning = prompt.reference or "", reasoning_of(messages[turn])
    if reasoning:
        rendered = template.rendered(messages, turn).strip()
        said = rendered if reasoning in rendered else f"{reasoning}\n\n{said}"
    trained = _with_reference(prompt, item, span, decoder, said=said, reasoning=reasoning)
    users = [readable(message.get("content")).strip() for message in messages[:turn] if message["role"] == "user"]
    difference = _difference_of_prompts(prompt.input_ids, item, span[0], users, decoder)
    return replace(trained, differences=(*trained.differences, *difference))


def _span_of_turn(prompt_ids: list[int], item: Item, messages: Sequence[Message], turn: int) -> tuple[int, int] | None:
    """Begin and end, in the item, of what is trained of `messages[turn]`, without what the prompt has already.

    Equal where nothing of it is trained; None where it cannot be told.
    """
    spans = answer_spans(item.mask, len(item.ids), shifted=False)
    num_prompt = len(prompt_ids)
    if item.ids[:num_prompt] == prompt_ids:
        ends = [end for start, end in spans if start <= num_prompt < end]
        return (num_prompt, ends[0] if ends else num_prompt)
    if any(message.get("loss_mask") is not None for message in messages):  # with verl 0.6 any message may be trained
        return None
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    place = turns.index(turn)
    if len(spans) != len(turns):
        if not item.is_full or len(spans) > len(turns):
            return None
        place -= len(turns) - len(spans) if item.is_cut_left else 0
    if not 0 <= place < len(spans):
        return None
    start, end = spans[place]
    return (start + _overlap(prompt_ids, item.ids, start, end), end)


def _overlap(prompt_ids: list[int], ids: list[int], start: int, end: int) -> int:
    """How many tokens of the answer `ids[start:end]` the prompt ends in already: those of a think block, say."""
    for length in range(min(end - start, len(prompt_ids)) + 1):
        rest = prompt_ids[: len(prompt_ids) - length]
        is_same_before = rest[-_OVERLAP:] == ids[max(0, start - _OVERLAP) : start]
        if is_same_before and prompt_ids[len(rest) :] == ids[start : start + length]:
            return length
    return 0


def _with_reference(
    prompt: Prompt, item: Item, span: tuple[int, int], decoder: Decoder, *, said: str, reasoning: str
) -> Prompt:
    """`prompt` with the tokens `span` of the item as reference.

    Args:
        said: What the data says, reasoning included.
        reasoning: The reasoning that the data has apart from the answer, "" without any.
    """
    texts = trained_texts(item.ids[slice(*span)], prompt.input_ids, decoder)
    trained = texts["reference"]
    # As the tokenizer has it: one without a token for a character is no matter of training.
    is_same = said == trained or decoder.answer(encode(decoder.tokenizer, said), prompt.input_ids).strip() == trained
    differences = () if is_same else (_difference_of_answers(said, trained, reasoning, item),)
    return replace(prompt, **texts, reference_text=None if said == trained else said, differences=differences)


def _difference_of_answers(said: str, trained: str, reasoning: str, item: Item) -> str:
    is_lost = reasoning not in trained or any(mark in said and mark not in trained for mark in KNOWN_ENDS)
    if item.is_full and said.startswith(trained):
        return ANSWER_IS_CUT
    if is_lost:
        return REASONING_IS_LOST
    return TEMPLATE_ADDS if said in trained else ANSWER_DIFFERS


def _difference_of_prompts(
    prompt_ids: list[int], item: Item, start: int, users: Sequence[str], decoder: Decoder
) -> tuple[str, ...]:
    """In what way a prompt is not what the item has before `start`; () where it is that, or has what was cut off."""
    before = item.ids[:start]
    has_lost_beginning = item.is_full and item.is_cut_left
    if prompt_ids[-len(before) if has_lost_beginning and before else 0 :] == before:
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
    rows: dict[str, dict[int | None, None]] = {}
    for prompt in prompts:
        for difference in prompt.differences:
            rows.setdefault(difference, {})[prompt.row] = None
    if rows:
        texts = [f"{difference} (rows {_listed(list(found))})" for difference, found in rows.items()]
        logger.warning(
            "validation data and training differ: %s; the samples have what is trained as `reference`, and what the "
            "data says as `reference_text`",
            "; ".join(texts),
        )


def _listed(rows: Sequence[int | None]) -> str:
    most = 10
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(map(str, rows[:most])) + more
