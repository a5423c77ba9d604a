"""Reads the prompts of a validation data set: verl's two, and any other by the loss masks of its items.

This module owns what is known of verl's data sets; it knows neither the trainer nor how an answer is generated. It only
reads: it draws no random number, and data set and tokenizer stay as they are. verl is never imported: whoever holds one
of its data sets has its module loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Any, NamedTuple

from verl_valgen.prompts.columns import row_data, without_arrays
from verl_valgen.prompts.conversations import ChatTemplate, answered_turns, prompt_for_turn, readable
from verl_valgen.prompts.masks import answer_spans, has_media, prompt_before_span, without_padding
from verl_valgen.prompts.tokens import Decoder
from verl_valgen.prompts.trained import as_single_turn_is_trained, as_turn_is_trained, read_item
from verl_valgen.records import Prompt, RowData


class DatasetPrompts(NamedTuple):
    """The prompts of the rows that were asked for, and the rows that have none, all in order."""

    prompts: list[Prompt]
    without_answer: list[int]
    """Rows whose answer has been truncated away."""
    multi_modal: list[int]
    """Rows with images or videos: only text is passed on, and without them the question is another one."""


class _Skip(Enum):
    """The reason for which a row has no prompt."""

    ANSWER_IS_CUT_OFF = auto()
    HAS_MEDIA = auto()


def prompts_from_dataset(
    dataset: Any,
    rows: Sequence[int],
    tokenizer: Any,
    *,
    turn: str = "last",
    params_key: str = "generation_params",
    refused: dict[int, Exception] | None = None,
    end_ids: Collection[int] = (),
) -> DatasetPrompts:
    """The prompts of `rows`: everything before an assistant turn, the generation prompt included.

    Rows of verl's own data sets are tokenized anew, as the model is asked; their items have the references, as they are
    trained (`trained.py`). In the items of any other one, the loss mask tells where the answers are. `truncation=left`
    does not shorten the prompts of verl's data sets: at inference nothing is cut off either.

    Args:
        turn: The assistant turn to answer: last, first, or all, each with a prompt of its own.
        params_key: The column that holds a row's own generation parameters.
        refused: Takes what data set and chat template raise, by row; these rows have no prompt.
        end_ids: The tokens that end an answer.

    Raises whatever they raise, where it is not given: `ValueError` for an item of another data set that has no
    `input_ids`, or masks of another length.
    """
    read: Callable[[Any, int, Decoder, str], list[Prompt] | _Skip]
    if mask_is_shifted(dataset):
        read = _from_single_turn
    elif _reads_items_as(dataset, "multiturn_sft_dataset", "MultiTurnSFTDataset"):
        read = _from_conversation
    else:
        read = _from_item
    decoder = Decoder(tokenizer, end_ids)
    result = DatasetPrompts([], [], [])
    for row in rows:
        try:
            prompts = read(dataset, row, decoder, turn)
        except Exception as e:  # a template raises what it likes
            if refused is None:
                raise
            refused[row] = e
            continue
        if prompts is _Skip.HAS_MEDIA:
            result.multi_modal.append(row)
        elif prompts is _Skip.ANSWER_IS_CUT_OFF:
            result.without_answer.append(row)
        else:
            data = _columns(dataset, row, params_key)
            result.prompts.extend(replace(prompt, data=data) for prompt in prompts)
    return result


def mask_is_shifted(dataset: Any) -> bool:
    """Tells whether the items' loss mask lies one to the left of the answer's tokens, as in verl's `SFTDataset`."""
    return _reads_items_as(dataset, "sft_dataset", "SFTDataset")


def _reads_items_as(dataset: Any, module: str, name: str) -> bool:
    """Tells whether `dataset` is of verl's class, or of one that inherits its `__getitem__`."""
    verls = getattr(sys.modules.get(f"verl.utils.dataset.{module}"), name, None)  # verl >= 0.7.1 has no SFTDataset
    return verls is not None and getattr(type(dataset), "__getitem__", None) is verls.__getitem__


def _columns(dataset: Any, row: int, params_key: str) -> RowData:
    frame: Any = getattr(dataset, "dataframe", None)
    return row_data(frame.iloc[row].to_dict(), params_key) if hasattr(frame, "iloc") else RowData()


# verl's data sets


def _from_single_turn(dataset: Any, row: int, decoder: Decoder, _: str) -> list[Prompt] | _Skip:
    """The prompt of a row of verl's `SFTDataset`."""
    question = dataset.prompts[row]
    template, messages = _chat_template(dataset), [{"role": "user", "content": question}]
    input_ids = template.prompt_ids(messages)
    if _answer_is_cut_off(dataset, input_ids):
        return _Skip.ANSWER_IS_CUT_OFF
    reference, source = dataset.responses[row].strip(), template.checksum(messages)
    prompt = Prompt(row, input_ids, readable(question), reference, source=source)
    item = read_item(dataset, row)
    return [prompt if item is None else as_single_turn_is_trained(prompt, item, decoder)]


def _from_conversation(dataset: Any, row: int, decoder: Decoder, turn: str) -> list[Prompt] | _Skip:
    """The prompts of a row of verl's `MultiTurnSFTDataset`; one without an assistant turn is all prompt."""
    messages = _messages(dataset, row)
    if messages is None:
        return _Skip.HAS_MEDIA
    template = replace(_chat_template(dataset, **_row_kwargs(dataset, row)), end_ids=decoder.left_out)
    by_turn = {i: prompt_for_turn(messages, i, template, row=row) for i in answered_turns(messages, turn)}
    whole = {
        i: prompt
        for i, prompt in by_turn.items()
        if prompt.reference is None or not _answer_is_cut_off(dataset, prompt.input_ids)
    }
    if not whole:
        return _Skip.ANSWER_IS_CUT_OFF
    item = read_item(dataset, row)
    if item is None:
        return list(whole.values())
    return [
        as_turn_is_trained(prompt, item, messages, i, template) if i < len(messages) else prompt
        for i, prompt in whole.items()
    ]


def _messages(dataset: Any, row: int) -> list[dict] | None:
    """The messages of a row as they go to the chat template; None if images or videos belong to them."""
    if not hasattr(dataset, "_build_messages"):  # verl <= 0.6
        messages = without_arrays(dataset.messages[row])
        messages = [messages] if isinstance(messages, dict) else messages  # a single message comes unpacked
        return None if _has_other_parts(messages) else messages
    frame = dataset.dataframe
    for column in (dataset.image_key, dataset.video_key):
        media = without_arrays(frame[column].iloc[row]) if column in frame.columns else None
        if isinstance(media, list) and media:  # an empty cell may be pandas.NA, which is neither true nor false
            return None
    example = without_arrays(frame.iloc[row].to_dict())  # a copy: verl 0.7 changes messages in place
    if _has_other_parts(example[dataset.messages_key]):
        return None
    # With a processor, string contents become lists of parts; which ones do depends on verl's version.
    return without_arrays(dataset._build_messages(example))


def _has_other_parts(messages: list[dict]) -> bool:
    """Tells whether a message's content has a part that is not text: an image, a video, a sound."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(part.get("type") not in (None, "text") for part in parts if isinstance(part, dict))


def _chat_template(dataset: Any, **row_kwargs: Any) -> ChatTemplate:
    kwargs = getattr(dataset, "apply_chat_template_kwargs", None) or {}  # verl 0.5 has none
    processor = getattr(dataset, "processor", None)  # verl >= 0.7
    return ChatTemplate(dataset.tokenizer, {**kwargs, **row_kwargs}, processor)


def _row_kwargs(dataset: Any, row: int) -> dict[str, Any]:
    """The arguments that verl's `MultiTurnSFTDataset` passes to the chat template for this row alone."""
    kwargs: dict[str, Any] = {"tools": None if dataset.tools is None else dataset.tools[row]}
    column, default = dataset.enable_thinking, getattr(dataset, "enable_thinking_default", None)  # verl >= 0.7.1
    thinking = default if column is None else column[row]
    if hasattr(dataset, "_process_message_tokens"):
        # verl <= 0.6 passes None too, and for a template that asks whether `enable_thinking` is defined, it then is.
        kwargs["enable_thinking"] = thinking
    elif thinking is not None:
        # As verl >= 0.8: its configuration's default is the string "none", which is true. verl 0.7 passes the value
        # itself; only to a template that asks `is false`, as Qwen3's does, an integer column's 0 is another one.
        kwargs["enable_thinking"] = bool(thinking)
    return kwargs


def _answer_is_cut_off(dataset: Any, prompt_ids: list[int]) -> bool:
    """Tells whether verl's truncation leaves nothing of the answer."""
    cuts_right = dataset.truncation == "right" or getattr(dataset, "pad_mode", None) == "no_padding"
    return cuts_right and len(prompt_ids) >= dataset.max_length


# Other data sets


def _from_item(dataset: Any, row: int, decoder: Decoder, turn: str) -> list[Prompt] | _Skip:
    """The prompts of an item of a data set that is not verl's; one without a loss mask is all prompt."""
    item = dataset[row]
    keys = ("input_ids", "attention_mask", "loss_mask")
    input_ids, *masks = (item.get(key, None) for key in keys) if hasattr(item, "get") else (None,)
    if input_ids is None:
        raise ValueError(f"an item of {type(dataset).__name__} must be a mapping with `input_ids`, got {item!r:.200}")
    if has_media(item.get("multi_modal_inputs", None)):
        return _Skip.HAS_MEDIA
    ids, mask = without_padding(input_ids, *masks)
    if mask is not None and not any(mask):
        return _Skip.ANSWER_IS_CUT_OFF
    spans = answer_spans(mask, len(ids), shifted=False)
    chosen = {"first": spans[:1], "last": spans[-1:], "all": spans}[turn] or [(len(ids), len(ids))]
    return [prompt_before_span(ids, start, end, decoder, row) for start, end in chosen]
