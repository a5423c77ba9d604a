"""Prompts of batches, and of items that have loss masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from unit.prompts.data import (
    IMAGES,
    NO_IMAGES,
    VERL,
    all_prompts,
    first_batch,
    ids_and_references,
    multi_turn,
    needs_sft_dataset,
    only_prompt,
    since_verl_0_6,
    since_verl_0_7,
    single_turn,
    talk,
    template_ids,
)

from verl_valgen.prompts.datasets import mask_is_shifted, prompts_from_dataset
from verl_valgen.prompts.differences import ANSWER_IS_CUT
from verl_valgen.prompts.masks import prompts_from_batch
from verl_valgen.records import Prompt

# Batches of verl's data sets


def verls_collator(pad_mode):
    return pytest.importorskip("verl.utils.dataset.dataset_utils").SFTTensorCollator(pad_mode)


def batch_forms(batch):
    """The batch as the collator gives it, in a TensorDict, and in the one that verl's trainer puts it into."""
    yield batch
    yield TensorDict(batch, batch_size=[len(batch["input_ids"])])
    if VERL >= (0, 7) and not isinstance(batch.get("multi_modal_inputs"), dict):  # verl refuses a dict
        from verl.utils.tensordict_utils import get_tensordict

        yield get_tensordict(batch, {"pad_mode": "no_padding"})


@needs_sft_dataset
def test_single_turn_batch_equals_rows(tmp_path, tokenizer):
    dataset = single_turn(tmp_path, tokenizer, [("one?", "1"), ("two ?", " 2 . "), ("none?", "")])
    assert mask_is_shifted(dataset)
    batch = first_batch(dataset)
    prompts = prompts_from_batch(batch, tokenizer, shifted=True)
    assert [prompt.row for prompt in prompts] == [None] * 3
    assert ids_and_references(prompts) == ids_and_references(all_prompts(dataset, tokenizer))


@needs_sft_dataset
@pytest.mark.parametrize("num_lost", [1, 5, 12, 13, 14, 20])
def test_single_turn_left_truncation(tmp_path, tokenizer, num_lost):
    """The row gives the whole prompt, the batch what is left of it: its mask begins too late and is not followed."""
    question, answer = "one plus two, is it?", "yes, three"
    whole = template_ids(tokenizer, talk(question))
    max_length = len(whole) + len(answer) + 1 - num_lost
    dataset = single_turn(tmp_path, tokenizer, [(question, answer)] * 2, truncation="left", max_length=max_length)
    assert only_prompt(dataset, tokenizer).input_ids == whole
    prompt, _ = prompts_from_batch(first_batch(dataset), tokenizer, shifted=True)
    assert (prompt.input_ids, prompt.reference) == (whole[num_lost:], answer)


@needs_sft_dataset
@pytest.mark.parametrize("num_kept", [-3, 0, 1, 2, 5])
def test_single_turn_right_truncation(tmp_path, tokenizer, num_kept):
    """`num_kept` tokens of the answer are left."""
    whole = template_ids(tokenizer, talk("one?"))
    config = {"truncation": "right", "max_length": len(whole) + num_kept}
    dataset = single_turn(tmp_path, tokenizer, [("one?", "12345678")] * 2, **config)
    prompts, without_answer, _ = prompts_from_dataset(dataset, [0], tokenizer)
    from_batch, _ = prompts_from_batch(first_batch(dataset), tokenizer, shifted=True)
    if num_kept > 0:
        assert ids_and_references(prompts) == [(whole, "12345678"[:num_kept])]
        assert (prompts[0].reference_text, *prompts[0].differences) == ("12345678", ANSWER_IS_CUT)
        assert (from_batch.input_ids, from_batch.reference) == (whole, "12345678"[:num_kept])
    else:
        assert (prompts, without_answer) == ([], [0])
        assert (from_batch.input_ids, from_batch.reference) == (whole[: len(whole) + num_kept], None)


def test_batch_has_the_closed_think_block_where_the_mask_has_it(tmp_path, tokenizer):
    """verl <= 0.6 counts it among the generation prompt, later versions among the answer."""
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A")], {"enable_thinking": [False]})
    row = only_prompt(dataset, tokenizer)
    (prompt,) = prompts_from_batch(first_batch(dataset), tokenizer, shifted=False)
    if VERL < (0, 7):
        assert ids_and_references([prompt]) == ids_and_references([row])
    else:
        think = tokenizer("<think>\n\n</think>\n\n")["input_ids"]
        assert (prompt.input_ids + think, prompt.reference) == (row.input_ids, "<think>\n\n</think>\n\nA")


@since_verl_0_6
@pytest.mark.parametrize("pad_mode", ["right", "no_padding"])
def test_batch_of_verls_collator_equals_rows(tmp_path, tokenizer, pad_mode):
    conversations = [talk("a?", "A"), talk("longer?", "B", "c?", "C", system="Be brief."), talk("a?", "")]
    dataset = multi_turn(tmp_path, tokenizer, conversations, pad_mode=pad_mode)
    batch = first_batch(dataset, collate_fn=verls_collator(pad_mode))
    assert batch["input_ids"].is_nested == (pad_mode == "no_padding")
    rows = all_prompts(dataset, tokenizer)
    for form in batch_forms(batch):
        prompts = prompts_from_batch(form, tokenizer, shifted=False)
        assert [prompt.row for prompt in prompts] == [None] * 3
        assert ids_and_references(prompts) == ids_and_references(rows)


@pytest.mark.parametrize("shifted", [False, pytest.param(True, marks=needs_sft_dataset)])
def test_left_padded_batch_equals_rows(tmp_path, tokenizer, shifted):
    if shifted:
        dataset = single_turn(tmp_path, tokenizer)
    else:
        dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A"), talk("longer?", "B"), talk("c?", "C")])
    batch = first_batch(dataset)
    for row in range(3):
        padding = int((batch["attention_mask"][row] == 0).sum())
        for tensor in map(batch.get, ("input_ids", "attention_mask", "loss_mask")):
            tensor[row] = tensor[row].roll(padding)
    assert not batch["attention_mask"][0, 0]
    rows = all_prompts(dataset, tokenizer)
    for form in (batch, TensorDict(batch, batch_size=[3])):
        assert ids_and_references(prompts_from_batch(form, tokenizer, shifted=shifted)) == ids_and_references(rows)


# Images and videos


@since_verl_0_7
def test_rows_with_images_are_none_in_a_batch_of_verls_collator(tmp_path, tokenizer):
    conversations = [talk("a?", "A"), talk("longer?", "B"), talk("a?", "A"), *[talk("c?", "C")] * len(NO_IMAGES)]
    dataset = multi_turn(tmp_path, tokenizer, conversations, pad_mode="no_padding")
    items = [dataset[row] for row in range(len(dataset))]
    # The first row has images: verl's collator asks it for every key that any row has.
    for item, inputs in zip(items, [IMAGES, None, {"pixel_values": torch.ones(1, 3)}, *NO_IMAGES], strict=True):
        item["multi_modal_inputs"] = inputs
    del items[1]["multi_modal_inputs"]
    rows = all_prompts(dataset, tokenizer)
    for form in batch_forms(verls_collator("no_padding")(items)):
        prompts = prompts_from_batch(form, tokenizer, shifted=False)
        assert [row for row, prompt in enumerate(prompts) if prompt is None] == [0, 2]
        assert ids_and_references(filter(None, prompts)) == ids_and_references([rows[1], *rows[3:]])


@since_verl_0_6
@pytest.mark.parametrize("inputs", [IMAGES, *NO_IMAGES[1:]])
def test_rows_with_images_are_none_in_a_padded_batch(tmp_path, tokenizer, inputs):
    """In a padded batch all rows have images, or none has."""
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A"), talk("longer?", "B")])
    batch = verls_collator("right")([dataset[row] | {"multi_modal_inputs": inputs} for row in range(2)])
    assert isinstance(batch["multi_modal_inputs"], dict)
    rows = all_prompts(dataset, tokenizer)
    for form in batch_forms(batch):
        prompts = prompts_from_batch(form, tokenizer, shifted=False)
        if inputs is IMAGES:
            assert prompts == [None, None]
        else:
            assert ids_and_references(prompts) == ids_and_references(rows)


@pytest.mark.parametrize("wrap", [list, lambda rows: np.array(rows, dtype=object)])
def test_rows_with_images_are_none_in_somebodys_own_batch(tokenizer, wrap):
    ids = torch.tensor([tokenizer("abc")["input_ids"], tokenizer("xyz")["input_ids"]])
    batch = {"input_ids": ids, "multi_modal_inputs": wrap([None, IMAGES])}
    assert prompts_from_batch(batch, tokenizer, shifted=False) == [Prompt(None, ids[0].tolist(), "abc", None), None]


# Any masks


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("form", [dict, lambda batch: TensorDict(batch, batch_size=[2])])
def test_batch_without_answers_is_all_prompt(tokenizer, form, shifted):
    ids = torch.tensor([tokenizer("abc")["input_ids"], tokenizer("xyz")["input_ids"]])
    expected = [Prompt(None, ids[0].tolist(), "abc", None), Prompt(None, ids[1].tolist(), "xyz", None)]
    assert prompts_from_batch(form({"input_ids": ids}), tokenizer, shifted=shifted) == expected
    batch = form({"input_ids": ids, "loss_mask": torch.zeros_like(ids)})
    assert prompts_from_batch(batch, tokenizer, shifted=shifted) == expected


@settings(max_examples=200, deadline=None)
@given(data=st.data(), shifted=st.booleans(), nested=st.booleans())
def test_any_mask_gives_slices(tokenizer, data, shifted, nested):
    """Whatever the masks: prompt and answer are neighbouring slices of the tokens, and the answer has the last one."""
    num_tokens = data.draw(st.integers(1, 12))
    bits = st.lists(st.integers(0, 1), min_size=num_tokens, max_size=num_tokens)
    letters = data.draw(st.text("abcdef", min_size=num_tokens, max_size=num_tokens))
    mask, attention = data.draw(bits), data.draw(bits)
    batch = {
        "input_ids": torch.tensor([tokenizer(letters)["input_ids"]]),
        "attention_mask": torch.tensor([attention]),
        "loss_mask": torch.tensor([mask]),
    }
    if nested:
        batch = {key: torch.nested.as_nested_tensor(list(tensor), layout=torch.jagged) for key, tensor in batch.items()}
    (prompt,) = prompts_from_batch(batch, tokenizer, shifted=shifted)

    letters = "".join(letter for letter, real in zip(letters, attention, strict=True) if real)
    mask = "".join(str(bit) for bit, real in zip(mask, attention, strict=True) if real)
    answer = mask.rstrip("0")
    start, end = len(answer.rstrip("1")), len(answer)
    start, end = (min(start + 1, len(mask)), min(end + 1, len(mask))) if shifted else (start, end)
    if "1" not in mask or start == end:
        assert (prompt.text, prompt.reference) == (letters, None)
    else:
        assert (prompt.text, prompt.reference) == (letters[:start], letters[start:end])
    assert prompt.input_ids == tokenizer(prompt.text)["input_ids"]
