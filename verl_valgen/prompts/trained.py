"""What verl trains of a row, by the item of its data set, and in what way prompt and data are not that.

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
from verl_valgen.prompts.masks import answer_spans, trained_texts, without_padding
from verl_valgen.prompts.reasoning import KNOWN_ENDS, reasoning_of
from verl_valgen.prompts.tokens import Decoder, encode
from verl_valgen.records import Prompt
from verl_valgen.text import describe, printable

logger = logging.getLogger(__name__)

_OVERLAP = 8
"""Number of tokens by which prompt and item are recognised as the same at the beginning of an answer."""

_MOST_LISTED = 10
"""Number of rows that the warning names for each difference."""

_TAIL = 64
"""Number of the prompt's last tokens in which something is looked for."""

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
    difference = _difference_of_prompts(prompt.input_ids, item, span[0], users, decoder)
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
    difference = _difference_of_answers(said, trained, reasoning, item, decoder)
    return replace(
        prompt, **texts, reference_text=None if said == trained else said, differences=(difference,) * bool(difference)
    )


def _difference_of_answers(said: str, trained: str, reasoning: str, item: Item, decoder: Decoder) -> str:
    """In what way what is trained is not what the data says; "" where it is that."""
    # White space is the template's. And a tokenizer without a token for a character is no matter of training.
    as_tokens = decoder.answer(encode(decoder.tokenizer, said))
    if _without_space(trained) in (_without_space(said), _without_space(as_tokens)):
        return ""
    if not trained:
        return NOT_TRAINED
    if item.is_cut_right and _without_space(as_tokens).startswith(_without_space(trained)):
        return ANSWER_IS_CUT
    if reasoning not in trained or any(mark in said and mark not in trained for mark in KNOWN_ENDS):
        return REASONING_IS_LOST
    return TEMPLATE_ADDS if said in trained else ANSWER_DIFFERS


def _without_space(text: str) -> str:
    return "".join(text.split())


def _difference_of_prompts(
    prompt_ids: list[int], item: Item, start: int, users: Sequence[str], decoder: Decoder
) -> tuple[str, ...]:
    """In what way a prompt is not what the item has before `start`; () where it is that, or has what was cut off."""
    before = item.ids[:start]
    if prompt_ids[-len(before) if item.is_cut_left and before else 0 :] == before:
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
    rows: dict[str, dict[tuple[str | None, int | None], None]] = {}
    for prompt in prompts:
        for difference in prompt.differences:
            rows.setdefault(difference, {})[prompt.file, prompt.row] = None
    if rows:
        texts = [f"{difference} ({_listed(list(found))})" for difference, found in rows.items()]
        logger.warning(
            "validation data and training differ: %s; the samples have what is trained as `reference`, and what the "
            "data says as `reference_text`",
            "; ".join(texts),
        )


def _listed(rows: Sequence[tuple[str | None, int | None]]) -> str:
    """Rows with their files, as far as there are several; not all of very many."""
    by_file: dict[str | None, list[str]] = {}
    for file, row in rows[:_MOST_LISTED]:
        by_file.setdefault(file, []).append(str(row))
    texts = [
        f"row{'s' if len(own) > 1 else ''} {', '.join(own)}" + (f" of {printable(file, 200)}" if file else "")
        for file, own in by_file.items()
    ]
    more = [f"{len(rows) - _MOST_LISTED} more"] if len(rows) > _MOST_LISTED else []
    return " and ".join([*texts, *more])
