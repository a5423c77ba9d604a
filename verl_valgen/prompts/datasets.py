"""Where a prompt ends and its answer begins: rows of a data set, or batches of a loader, become `Prompt`s.

Owns what is known of verl's data sets; knows neither the trainer nor how an answer is generated.
Its four sources (two data sets of verl's, any other one, batches) stay in one file, as they have to agree.
It reads only: no random number is drawn here, and data set, batch and tokenizer stay as they are. verl is never
imported: whoever holds one of its data sets has its module loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Any, NamedTuple

from verl_valgen.prompts.columns import plain, row_data
from verl_valgen.prompts.conversations import answered_turns, readable
from verl_valgen.prompts.masks import answer_spans, end_of_last, without_padding
from verl_valgen.records import Prompt, RowData


class DatasetPrompts(NamedTuple):
    """What `prompts_from_dataset` has read: each row it was asked for is in one of the three lists, in order."""

    prompts: list[Prompt]
    without_answer: list[int]
    """Rows of whose answer truncation has left nothing."""
    multi_modal: list[int]
    """Rows with images or videos: only text is passed on, and without them the question is another one."""


class _LeftOut(Enum):
    """Why a row has no prompt."""

    WITHOUT_ANSWER = auto()
    MULTI_MODAL = auto()


def prompts_from_dataset(
    dataset: Any, rows: Sequence[int], tokenizer: Any, *, turn: str = "last", params_key: str = "generation_params"
) -> DatasetPrompts:
    """Read `rows` of `dataset`: their prompts, and those rows that have none.

    A prompt is everything before an assistant turn, the generation prompt included; `turn` says before which (last,
    first, or a prompt for each of all). Rows of verl's own data sets are tokenized anew, as the data set does it; in
    the items of any other one, the loss mask tells where the answers are. `params_key` is the column of a row's
    parameters.
    `truncation=left` does not shorten the prompts of verl's data sets: at inference nothing is cut off either.

    Raises `ValueError` where an item of another data set has no `input_ids` or masks of another length, and whatever
    data set and template raise.
    """
    read: Callable[[Any, int, Any, str], list[Prompt | _LeftOut]]
    if mask_is_shifted(dataset):
        read = _from_single_turn
    elif _is_verls(dataset, "multiturn_sft_dataset", "MultiTurnSFTDataset"):
        read = _from_conversation
    else:
        read = _from_item
    found = DatasetPrompts([], [], [])
    for row in rows:
        results = read(dataset, row, tokenizer, turn)
        prompts = [result for result in results if isinstance(result, Prompt)]
        if prompts:
            data = _row_data(dataset, row, params_key)
            found.prompts.extend(replace(prompt, data=data) for prompt in prompts)
        elif results[0] is _LeftOut.MULTI_MODAL:
            found.multi_modal.append(row)
        else:
            found.without_answer.append(row)
    return found


def _row_data(dataset: Any, row: int, params_key: str) -> RowData:
    frame: Any = getattr(dataset, "dataframe", None)
    return row_data(frame.iloc[row].to_dict(), params_key) if hasattr(frame, "iloc") else RowData()


def prompts_from_batch(batch: Any, tokenizer: Any, *, shifted: bool) -> list[Prompt | None]:
    """Take a batch of a validation loader apart: one prompt per row, in order, with `row=None`; None for a row with
    images or videos.

    `batch`: a dict or TensorDict of `input_ids` and, where it has them, `attention_mask` and `loss_mask`: each padded,
    on either side, to (batch, length), or nested; and `multi_modal_inputs`, if any: one mapping or None per row, or one
    mapping for all. `shifted`: what `mask_is_shifted` says of the data set. The answer is the last run of ones in the
    loss mask; a row without any (verl's `validation_step` pops the mask) is all prompt. Raises `ValueError` where a
    mask is not as long as its tokens.

    verl's `SFTDataset` with `truncation=left` computes its mask from the untruncated length, so that it begins too
    late. There a row that has lost its beginning is cut after its generation prompt. Should that be lost too, or should
    `apply_chat_template_kwargs` change it, then the prompt is too long or too short by a few tokens.
    """
    input_ids = batch["input_ids"].unbind()
    masks = [batch.get(key, None) for key in ("attention_mask", "loss_mask")]
    unbound = [[None] * len(input_ids) if mask is None else mask.unbind() for mask in masks]
    media = _unwrapped(batch.get("multi_modal_inputs", None))
    if media is None or isinstance(media, Mapping):  # default_collate has stacked what every row has
        media = [media] * len(input_ids)
    opening, generation_prompt = _chat_markers(tokenizer) if shifted else (None, [])
    prompts: list[Prompt | None] = []
    for multi_modal_inputs, *row in zip(media, input_ids, *unbound, strict=True):
        if _has_media(multi_modal_inputs):
            prompts.append(None)
            continue
        ids, mask = without_padding(*row)
        start, end = _last(answer_spans(mask, len(ids), shifted), len(ids))
        lost_beginning = len(ids) == len(row[0]) > 0 and ids[0] != opening
        if shifted and mask is not None and lost_beginning:
            start = end_of_last(generation_prompt, ids[:start])
        prompts.append(_split(ids, start, end, tokenizer, None))
    return prompts


def mask_is_shifted(dataset: Any) -> bool:
    """Whether the items' loss mask lies one to the left of the answer's tokens, as it does in verl's `SFTDataset`."""
    return _is_verls(dataset, "sft_dataset", "SFTDataset")


def decode(tokenizer: Any, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text of `token_ids` as it is: no space before a punctuation mark is cleaned up."""
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


# verl's data sets


def _is_verls(dataset: Any, module: str, name: str) -> bool:
    """Whether `dataset` makes its items as verl's class does: it is one, or its class inherits `__getitem__`."""
    verls = getattr(sys.modules.get(f"verl.utils.dataset.{module}"), name, None)  # verl >= 0.7.1 has no SFTDataset
    return verls is not None and getattr(type(dataset), "__getitem__", None) is verls.__getitem__


def _from_single_turn(dataset: Any, row: int, *_: Any) -> list[Prompt | _LeftOut]:
    """A row of verl's `SFTDataset`."""
    question = dataset.prompts[row]
    input_ids = _prompt_ids(dataset, [{"role": "user", "content": question}])
    if _answer_is_cut_off(dataset, input_ids):
        return [_LeftOut.WITHOUT_ANSWER]
    return [Prompt(row, input_ids, readable(question), dataset.responses[row].strip())]


def _from_conversation(dataset: Any, row: int, _: Any, turn: str) -> list[Prompt | _LeftOut]:
    """A row of verl's `MultiTurnSFTDataset`; without an assistant turn to leave out, the whole conversation."""
    messages = _messages(dataset, row)
    if messages is None:
        return [_LeftOut.MULTI_MODAL]
    kwargs = _row_kwargs(dataset, row)
    return [_from_turn(dataset, row, messages, i, kwargs) for i in answered_turns(messages, turn)]


def _from_turn(dataset: Any, row: int, messages: list[dict], turn: int, kwargs: Mapping[str, Any]) -> Prompt | _LeftOut:
    """The conversation up to the message `turn`, which is to be answered anew; it may lie behind the last."""
    before = messages[:turn]
    input_ids = _prompt_ids(dataset, before, **kwargs)
    questions = [message.get("content") for message in before if message["role"] == "user"]
    text = readable(questions[-1]) if questions else decode(dataset.tokenizer, input_ids, skip_special_tokens=True)
    if turn == len(messages):
        return Prompt(row, input_ids, text, reference=None)
    if _answer_is_cut_off(dataset, input_ids):
        return _LeftOut.WITHOUT_ANSWER

    answer = messages[turn]
    reference = readable(answer.get("content"))
    if not reference or answer.get("tool_calls"):
        prompt = _render(dataset, before, add_generation_prompt=True, tokenize=False, **kwargs)
        whole = _render(dataset, [*before, answer], add_generation_prompt=False, tokenize=False, **kwargs)
        # A template need not continue its own generation prompt (think blocks): the answer begins where they part.
        rendered = whole[len(os.path.commonprefix([prompt, whole])) :]  # noqa: RUF071 (character by character is meant)
        reference = decode(dataset.tokenizer, _encode(dataset.tokenizer, rendered), skip_special_tokens=True)
    return Prompt(row, input_ids, text, reference.strip())


def _messages(dataset: Any, row: int) -> list[dict] | None:
    """A row of `MultiTurnSFTDataset` as it goes to the chat template; None if images or videos belong to it."""
    if not hasattr(dataset, "_build_messages"):  # verl <= 0.6
        messages = plain(dataset.messages[row])
        messages = [messages] if isinstance(messages, dict) else messages  # a single message comes unpacked
        return None if _has_other_parts(messages) else messages
    frame = dataset.dataframe
    for column in (dataset.image_key, dataset.video_key):
        media = plain(frame[column].iloc[row]) if column in frame.columns else None
        if isinstance(media, list) and media:  # an empty cell may be pandas.NA, which is neither true nor false
            return None
    example = plain(frame.iloc[row].to_dict())  # a copy: verl 0.7 changes messages in place
    if _has_other_parts(example[dataset.messages_key]):
        return None
    # With a processor, string contents become lists of parts; which ones do depends on verl's version.
    return plain(dataset._build_messages(example))


def _row_kwargs(dataset: Any, row: int) -> dict[str, Any]:
    """What verl's `MultiTurnSFTDataset` passes to the chat template for this row alone."""
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


def _prompt_ids(dataset: Any, messages: list[dict], **kwargs: Any) -> list[int]:
    """The tokens of `messages` and the generation prompt. A processor tokenizes them itself, as verl has it do."""
    kwargs |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return _render(dataset, messages, add_generation_prompt=True, **kwargs)["input_ids"][0].tolist()


def _render(dataset: Any, messages: list[dict], **kwargs: Any) -> Any:
    processor = getattr(dataset, "processor", None)  # of a vision-language model, verl >= 0.7
    template = dataset.tokenizer if processor is None else processor
    kwargs = {**(getattr(dataset, "apply_chat_template_kwargs", None) or {}), **kwargs}  # verl 0.5 has none
    return template.apply_chat_template(messages, **kwargs)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the chat template has put them in


def _answer_is_cut_off(dataset: Any, prompt_ids: list[int]) -> bool:
    cuts_right = dataset.truncation == "right" or getattr(dataset, "pad_mode", None) == "no_padding"
    return cuts_right and len(prompt_ids) >= dataset.max_length


def _has_other_parts(messages: list[dict]) -> bool:
    """Whether a message's content has a part that is not text: an image, a video, a sound."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(part.get("type") not in (None, "text") for part in parts if isinstance(part, dict))


# Other data sets, and batches


def _from_item(dataset: Any, row: int, tokenizer: Any, turn: str) -> list[Prompt | _LeftOut]:
    """A row of a data set that is not verl's."""
    item = dataset[row]
    keys = ("input_ids", "attention_mask", "loss_mask")
    input_ids, *masks = (item.get(key, None) for key in keys) if hasattr(item, "get") else (None,)
    if input_ids is None:
        raise ValueError(f"an item of {type(dataset).__name__} must be a mapping with `input_ids`, got {item!r:.200}")
    if _has_media(_unwrapped(item.get("multi_modal_inputs", None))):
        return [_LeftOut.MULTI_MODAL]
    ids, mask = without_padding(input_ids, *masks)
    if mask is not None and not any(mask):
        return [_LeftOut.WITHOUT_ANSWER]
    spans = answer_spans(mask, len(ids), shifted=False)
    chosen = {"first": spans[:1], "last": spans[-1:], "all": spans}[turn] or [(len(ids), len(ids))]
    return [_split(ids, *span, tokenizer, row) for span in chosen]


def _last(spans: list[tuple[int, int]], num_tokens: int) -> tuple[int, int]:
    return spans[-1] if spans else (num_tokens, num_tokens)


def _split(ids: list[int], start: int, end: int, tokenizer: Any, row: int | None) -> Prompt:
    """The prompt before the answer `ids[start:end]`; what follows the answer belongs to neither."""
    reference = decode(tokenizer, ids[start:end], skip_special_tokens=True).strip() if start < end else None
    return Prompt(row, ids[:start], decode(tokenizer, ids[:start], skip_special_tokens=True), reference)


def _unwrapped(value: Any) -> Any:
    """`value` out of the NonTensorData, NonTensorStack or array that holds it: verl's collator makes a stack."""
    return value.tolist() if hasattr(value, "tolist") else value


def _has_media(multi_modal_inputs: Any) -> bool:
    """Whether there is more than what verl also puts there: whatever a tokenizer returns beside ids and mask."""
    if isinstance(multi_modal_inputs, Mapping):
        return not multi_modal_inputs.keys() <= {"token_type_ids", "mm_token_type_ids"}
    return multi_modal_inputs is not None and len(multi_modal_inputs) > 0


def _chat_markers(tokenizer: Any) -> tuple[int | None, list[int]]:
    """The token that a rendered conversation begins with, if any, and the tokens of the generation prompt."""
    messages = [{"role": "user", "content": ""}]
    opened, closed = (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=g) for g in (True, False)
    )
    return next(iter(_encode(tokenizer, opened)), None), _encode(tokenizer, opened[len(closed) :])
