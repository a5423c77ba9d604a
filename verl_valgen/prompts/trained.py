"""What verl trains of a row, by the item of its data set.

A chat template may render a turn in one way alone and in another within a conversation, and verl's versions tokenize
turn by turn in ways of their own: which answer is trained, behind which prompt, stands in the item alone. This module
knows items, tokens and texts; `datasets.py` knows where a row's conversation comes from.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from verl_valgen.prompts.conversations import ChatTemplate, Message, readable
from verl_valgen.prompts.differences import NOT_TRAINED, difference_of_answers, difference_of_prompts
from verl_valgen.prompts.masks import answer_spans, trained_texts, without_padding
from verl_valgen.prompts.reasoning import reasoning_of
from verl_valgen.prompts.tokens import Decoder
from verl_valgen.records import Prompt
from verl_valgen.text import describe

logger = logging.getLogger(__name__)

_OVERLAP = 8
"""Number of tokens by which prompt and item are recognised as the same at the beginning of an answer."""

_TAIL = 64
"""Number of the prompt's last tokens in which something is looked for."""


@dataclass(frozen=True)
class Item:
    """An item of verl's data set, without padding."""

    ids: list[int]
    mask: list[bool]
    """The loss mask."""
    is_cut_left: bool
    """Whether tokens are missing at the beginning."""
    is_cut_right: bool
    """Whether tokens may be missing at the end."""
    turns: Sequence[tuple[int, int]] = ()
    """Where each turn of the assistant begins and ends, its generation prompt included; () where that is not known."""


def read_item(dataset: Any, row: int) -> Item | None:
    """The item of a row of verl's data set; None, with a line at DEBUG, where it cannot be read.

    That training will fail there, and verl says why, is no reason to have no prompt.
    """
    pieces: list[tuple[int, bool]] = []
    try:
        item = _noting_turns(dataset, pieces)[row]
        ids, mask = without_padding(item["input_ids"], item.get("attention_mask"), item["loss_mask"])
        assert mask is not None, "a loss mask was given"
        cuts_left = dataset.truncation == "left" and getattr(dataset, "pad_mode", None) != "no_padding"
        is_full = len(ids) >= dataset.max_length
    except Exception as e:
        logger.debug("row %d: what is trained is not known, as its item cannot be read: %s", row, describe(e))
        return None
    num_lost = sum(length for length, _ in pieces) - len(ids)
    is_cut_left = is_full and cuts_left and num_lost != 0  # not known without the pieces, then below zero
    is_cut_right = is_full and not cuts_left and num_lost != 0
    if num_lost < 0 or (num_lost > 0 and not is_full):
        return Item(ids, mask, is_cut_left, is_cut_right)
    ends = list(accumulate((length for length, _ in pieces), initial=-num_lost if cuts_left else 0))
    whole = [(start, end) for (start, end), (_, is_turn) in zip(pairwise(ends), pieces, strict=True) if is_turn]
    turns = [(min(max(start, 0), len(ids)), min(max(end, 0), len(ids))) for start, end in whole]
    return Item(ids, mask, is_cut_left, is_cut_right, turns)


def _noting_turns(dataset: Any, pieces: list[tuple[int, bool]]) -> Any:
    """A copy of a data set that notes, when an item is read, each piece of a conversation that it tokenizes: its number
    of tokens, and whether it is a turn of the assistant."""

    def noted(tokenize: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            result = tokenize(*args, **kwargs)
            is_turn = kwargs.get("is_assistant") or (kwargs.get("message") or {}).get("role") == "assistant"
            pieces.append((len(result[0]), bool(is_turn)))
            return result

        return note

    noting = copy.copy(dataset)
    for name in ("_process_single_message", "_process_message_tokens"):  # since verl 0.7, until 0.6
        if hasattr(dataset, name):
            setattr(noting, name, noted(getattr(dataset, name)))
    return noting


def as_single_turn_is_trained(prompt: Prompt, item: Item, decoder: Decoder) -> Prompt:
    """`prompt` of verl's `SFTDataset` with the reference that is trained.

    `truncation=left` makes the data set's mask begin too late: there the text of the data stays.
    """
    spans = answer_spans(item.mask, len(item.ids), shifted=True)
    num_prompt = len(prompt.input_ids)
    if not spans or item.ids[:num_prompt] != prompt.input_ids or item.is_cut_left:
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
    before = item.ids[: span[0]]
    difference = difference_of_prompts(prompt.input_ids, before, users, decoder, is_cut=item.is_cut_left)
    return replace(trained, differences=(*trained.differences, *difference))


def _span_of_turn(prompt_ids: list[int], item: Item, messages: Sequence[Message], turn: int) -> tuple[int, int] | None:
    """Begin and end, in the item, of what is trained of `messages[turn]`, without what the prompt has already.

    Equal where nothing of it is trained; None where it cannot be told.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    place = turns.index(turn)
    if len(item.turns) == len(turns):
        begin, end = item.turns[place]
        places = [i for i in range(begin, end) if item.mask[i]]
        start, end = (places[0], places[-1] + 1) if places else (end, end)
    else:  # a version of verl that is not known
        spans = answer_spans(item.mask, len(item.ids), shifted=False)
        if len(spans) != len(turns):
            return None
        start, end = spans[place]
    return (start + _overlap(prompt_ids, item.ids, start, end), end)


def _overlap(prompt_ids: list[int], ids: list[int], start: int, end: int) -> int:
    """How many tokens of the answer `ids[start:end]` the prompt ends in already: those of a think block, say."""
    before = ids[max(0, start - _OVERLAP) : start]
    for length in range(min(end - start, len(prompt_ids), _TAIL) + 1):
        cut = len(prompt_ids) - length
        if prompt_ids[max(0, cut - _OVERLAP) : cut] == before and prompt_ids[cut:] == ids[start : start + length]:
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
    if said.endswith(trained):  # what comes before it may be the end of the prompt: a think block that is opened there
        head = said.removesuffix(trained).strip()
        said = trained if decoder.whole(prompt.input_ids[-_TAIL:]).rstrip().endswith(head) else said
    difference = difference_of_answers(said, trained, reasoning, decoder, is_cut=item.is_cut_right)
    return replace(
        prompt, **texts, reference_text=None if said == trained else said, differences=(difference,) * bool(difference)
    )
