"""Tells prompt from answer in tokens by their loss mask: a single row, or a batch of a loader.

This module knows no data set. It only reads: rows, batches and the tokenizer stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from verl_valgen.prompts.tokens import Decoder, encode
from verl_valgen.records import Prompt


def prompts_from_batch(
    batch: Any, tokenizer: Any, *, shifted: bool, end_ids: Collection[int] = ()
) -> list[Prompt | None]:
    """The prompts of a validation batch, one per row, in order, with `row=None`; None for a row with images or videos.

    The answer is the last run of ones in the loss mask. A row without any (verl's `validation_step` pops the mask) is
    all prompt.

    verl's `SFTDataset` with `truncation=left` computes its mask from the untruncated length, so that it begins too
    late. There a row that has lost its beginning is cut after its generation prompt. Should that be lost too, or should
    `apply_chat_template_kwargs` change it, then the prompt is too long or too short by a few tokens.

    Args:
        batch: A dict or TensorDict of `input_ids` and, where it has them, `attention_mask` and `loss_mask`: each
            padded, on either side, to (batch, length), or nested; and `multi_modal_inputs`, if any: one mapping or None
            per row, or one mapping for all.
        shifted: What `datasets.mask_is_shifted` says of the data set.
        end_ids: The tokens that end an answer.

    Raises:
        ValueError: A mask is not as long as its tokens.
    """
    input_ids = batch["input_ids"].unbind()
    masks = [batch.get(key, None) for key in ("attention_mask", "loss_mask")]
    attention_masks, loss_masks = ([None] * len(input_ids) if mask is None else mask.unbind() for mask in masks)
    media = _unwrapped(batch.get("multi_modal_inputs", None))
    if media is None or isinstance(media, Mapping):  # default_collate has stacked what every row has
        media = [media] * len(input_ids)
    first_token, generation_prompt = _chat_markers(tokenizer) if shifted else (None, [])
    decoder = Decoder(tokenizer, end_ids)
    prompts: list[Prompt | None] = []
    for padded, attention_mask, loss_mask, inputs in zip(input_ids, attention_masks, loss_masks, media, strict=True):
        if has_media(inputs):
            prompts.append(None)
            continue
        ids, mask = without_padding(padded, attention_mask, loss_mask)
        spans = answer_spans(mask, len(ids), shifted)
        start, end = spans[-1] if spans else (len(ids), len(ids))
        has_lost_beginning = len(ids) == len(padded) > 0 and ids[0] != first_token
        if shifted and mask is not None and has_lost_beginning:
            start = end_of_last(generation_prompt, ids[:start])
        prompts.append(prompt_before_span(ids, start, end, decoder))
    return prompts


def prompt_before_span(ids: list[int], start: int, end: int, decoder: Decoder, row: int | None = None) -> Prompt:
    """The prompt that lies before the answer `ids[start:end]`; tokens behind the answer belong to neither."""
    before, answer = ids[:start], ids[start:end]
    prompt = Prompt(row, before, decoder.readable(before), None)
    return replace(prompt, **trained_texts(answer, before, decoder)) if answer else prompt


def trained_texts(answer: list[int], before: list[int], decoder: Decoder) -> dict[str, Any]:
    """The fields of a `Prompt` for the tokens that are trained behind it."""
    reference, raw = decoder.answer(answer, before).strip(), decoder.whole(answer, before)
    return {"reference": reference, "reference_raw": None if raw == reference else raw}


def without_padding(input_ids: Any, attention_mask: Any, loss_mask: Any) -> tuple[list[int], list[bool] | None]:
    """One row's tokens and loss mask, each (length,), where the attention mask, if there is one, is set.

    Raises:
        ValueError: A mask is not as long as the tokens.
    """
    ids = torch.as_tensor(input_ids).flatten()
    for name, mask in (("attention_mask", attention_mask), ("loss_mask", loss_mask)):
        if mask is not None and (length := torch.as_tensor(mask).numel()) != len(ids):
            raise ValueError(f"`{name}` must be as long as `input_ids`, which has {len(ids)} tokens, got {length}")
    is_real = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask).flatten()
    mask = None if loss_mask is None else torch.as_tensor(loss_mask).flatten()[is_real.bool()].bool().tolist()
    return ids[is_real.bool()].tolist(), mask


def answer_spans(mask: list[bool] | None, num_tokens: int, shifted: bool) -> list[tuple[int, int]]:
    """Start and end of each answer, in order: the runs of ones in the loss mask; [] where there is none.

    Args:
        shifted: The mask lies one to the left of the answer's tokens.
    """
    spans, end = [], 0
    while mask and True in mask[end:]:
        start = mask.index(True, end)
        end = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
        spans.append((min(start + shifted, num_tokens), min(end + shifted, num_tokens)))
    return spans


def end_of_last(needle: list[int], ids: list[int]) -> int:
    """The index at which the last occurrence of `needle` in `ids` ends; `len(ids)` if there is none."""
    starts = range(len(ids) - len(needle), -1, -1)
    return next((i + len(needle) for i in starts if ids[i : i + len(needle)] == needle), len(ids))


def has_media(multi_modal_inputs: Any) -> bool:
    """Tells whether a row's `multi_modal_inputs` hold images or videos.

    verl also puts there whatever a tokenizer returns beside ids and mask, and tensordict wraps it.
    """
    inputs = _unwrapped(multi_modal_inputs)
    if isinstance(inputs, Mapping):
        return not inputs.keys() <= {"token_type_ids", "mm_token_type_ids"}
    return inputs is not None and len(inputs) > 0


def _unwrapped(value: Any) -> Any:
    """`value` out of the NonTensorData, NonTensorStack or array that holds it: verl's collator makes a stack."""
    return value.tolist() if hasattr(value, "tolist") else value


def _chat_markers(tokenizer: Any) -> tuple[int | None, list[int]]:
    """The token that a rendered conversation begins with, if any, and the tokens of the generation prompt."""
    messages = [{"role": "user", "content": ""}]
    opened, closed = (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=g) for g in (True, False)
    )
    return next(iter(encode(tokenizer, opened)), None), encode(tokenizer, opened[len(closed) :])
