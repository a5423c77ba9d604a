"""Prompts of verl's own data sets and of others, read from their rows."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from assets import SYSTEM_PROMPT, write_model, write_questions
from omegaconf import OmegaConf
from tensordict import NonTensorData, TensorDict
from transformers import AutoTokenizer
from unit.prompts.data import (
    IMAGES,
    MAX_LENGTH,
    NO_IMAGES,
    VERL,
    Items,
    MultiTurnSFTDataset,
    SFTDataset,
    all_prompts,
    first_batch,
    ids_and_references,
    item_ids,
    multi_turn,
    multi_turn_in_memory,
    needs_sft_dataset,
    only_prompt,
    since_verl_0_6,
    since_verl_0_7,
    single_turn,
    talk,
    template_ids,
)

from verl_valgen.prompts.datasets import DatasetPrompts, mask_is_shifted, prompts_from_dataset
from verl_valgen.prompts.masks import prompts_from_batch
from verl_valgen.prompts.tokens import Decoder
from verl_valgen.records import Prompt

# What the assets promise, as far as prompts rest on it


def test_assets_leave_the_random_state(tmp_path, rng_stays):
    write_model(tmp_path, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    first = (tmp_path / "model.safetensors").read_bytes()
    write_model(tmp_path, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    assert first == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("multiturn", [pytest.param(False, marks=needs_sft_dataset), True])
def test_assets_questions_are_read_by_verl(tmp_path, tokenizer, multiturn):
    train, val = write_questions(tmp_path, num_train=150, num_val=12, multiturn=multiturn)
    questions = pd.read_parquet(val)
    assert set(questions["question"]) <= set(pd.read_parquet(train)["question"])
    config = OmegaConf.create({"prompt_key": "question", "response_key": "answer", "max_length": MAX_LENGTH})
    dataset = (MultiTurnSFTDataset if multiturn else SFTDataset)(str(val), tokenizer, config)
    prompts = all_prompts(dataset, tokenizer)
    assert [prompt.text for prompt in prompts] == questions["question"].tolist()
    assert [prompt.reference for prompt in prompts] == questions["answer"].tolist()
    assert any(SYSTEM_PROMPT in Decoder(tokenizer).readable(p.input_ids) for p in prompts) == multiturn


# Single turn


@needs_sft_dataset
def test_single_turn_prompt_is_the_chat_template(tmp_path, tokenizer, rng_stays):
    dataset = single_turn(tmp_path, tokenizer)
    prompts = all_prompts(dataset, tokenizer, [2, 0, 1])
    assert [prompt.row for prompt in prompts] == [2, 0, 1]
    for prompt in prompts:
        question, answer = dataset.prompts[prompt.row], dataset.responses[prompt.row]
        assert prompt.input_ids == template_ids(tokenizer, talk(question))
        assert (prompt.text, prompt.reference) == (question, answer)


@needs_sft_dataset
@since_verl_0_6
def test_single_turn_passes_the_template_kwargs(tmp_path, tokenizer):
    dataset = single_turn(tmp_path, tokenizer, apply_chat_template_kwargs={"enable_thinking": False})
    prompt = only_prompt(dataset, tokenizer)
    assert prompt.input_ids == template_ids(tokenizer, talk(dataset.prompts[0]), enable_thinking=False)
    del dataset.apply_chat_template_kwargs  # as in verl 0.5
    assert only_prompt(dataset, tokenizer).input_ids == template_ids(tokenizer, talk(dataset.prompts[0]))


@needs_sft_dataset
def test_single_turn_prompt_and_answer_are_the_item(tmp_path, tokenizer):
    dataset = single_turn(tmp_path, tokenizer)
    for prompt in all_prompts(dataset, tokenizer):
        answer = tokenizer(dataset.responses[prompt.row] + "<|im_end|>")["input_ids"]
        assert item_ids(dataset, prompt.row) == prompt.input_ids + answer


@needs_sft_dataset
def test_single_turn_mask_is_shifted_in_subclasses_that_keep_getitem(tmp_path, tokenizer):
    class Renamed(SFTDataset):
        pass

    class Own(SFTDataset):
        def __getitem__(self, item):
            return {"input_ids": torch.arange(5), "loss_mask": torch.tensor([0, 0, 0, 1, 1])}

    assert mask_is_shifted(single_turn(tmp_path, tokenizer, cls=Renamed))
    own = single_turn(tmp_path, tokenizer, cls=Own)
    assert not mask_is_shifted(own)
    assert only_prompt(own, tokenizer).input_ids == [0, 1, 2]


# Conversations


def test_conversations_of_a_subclass_are_known_by_their_getitem(tmp_path, tokenizer):
    class Renamed(MultiTurnSFTDataset):
        pass

    class Own(MultiTurnSFTDataset):
        def __getitem__(self, item):
            return {"input_ids": torch.arange(5), "loss_mask": torch.tensor([0, 0, 0, 1, 1])}

    renamed, own = (multi_turn(tmp_path, tokenizer, [talk("a?", "A", "b?")], cls=cls) for cls in (Renamed, Own))
    assert only_prompt(renamed, tokenizer).text == "a?"
    assert only_prompt(own, tokenizer).input_ids == [0, 1, 2]


@since_verl_0_7
def test_conversations_of_a_subclass_are_built_by_it(tmp_path, tokenizer):
    class Loud(MultiTurnSFTDataset):
        def _build_messages(self, example):
            messages = super()._build_messages(example)
            return [message | {"content": example["prefix"] + message["content"].upper()} for message in messages]

    dataset = multi_turn(tmp_path, tokenizer, [talk("one?", "two")], {"prefix": ["hey "]}, cls=Loud)
    prompt = only_prompt(dataset, tokenizer)
    assert (prompt.text, prompt.reference) == ("hey ONE?", "hey TWO")
    assert item_ids(dataset, 0) == prompt.input_ids + tokenizer("hey TWO<|im_end|>\n")["input_ids"]


@pytest.mark.parametrize("pad_mode", ["right", pytest.param("no_padding", marks=since_verl_0_6)])
def test_enable_thinking_is_taken_from_its_column(tmp_path, tokenizer, pad_mode):
    columns = {"enable_thinking": [True, False]}
    conversations = [talk("a?", "A"), talk("a?", "A", "b?", "")]
    dataset = multi_turn(tmp_path, tokenizer, conversations, columns, pad_mode=pad_mode)
    thinking, hurried = all_prompts(dataset, tokenizer)
    assert thinking.input_ids == template_ids(tokenizer, talk("a?"), enable_thinking=True)
    assert hurried.input_ids == template_ids(tokenizer, talk("a?", "A", "b?"), enable_thinking=False)
    assert len(template_ids(tokenizer, talk("a?", "A", "b?"))) < len(hurried.input_ids)
    assert [thinking.reference, hurried.reference] == ["A", ""]
    for prompt in (thinking, hurried):
        answer = tokenizer(prompt.reference + "<|im_end|>\n")["input_ids"]
        assert item_ids(dataset, prompt.row) == prompt.input_ids + answer


@pytest.mark.parametrize(
    ("columns", "default"),
    [
        ({}, "unset"),
        ({}, None),
        ({}, "none"),  # what verl's configuration has; it is true
        ({}, False),
        ({"enable_thinking": [False]}, True),
        ({"enable_thinking": [1]}, None),
        ({"enable_thinking": [0]}, None),
    ],
)
def test_enable_thinking_is_passed_as_verl_passes_it(tmp_path, tokenizer, columns, default):
    if VERL[:2] == (0, 7) and (default == "none" or columns.get("enable_thinking") in ([0], [1])):
        pytest.skip("verl 0.7 passes the value on as it is, later versions and the prompts its truth")
    tokenizer = copy.deepcopy(tokenizer)
    header = "<|im_start|>{{ role }}({{ enable_thinking if enable_thinking is defined else 'undefined' }})\n"
    tokenizer.chat_template = (
        "{% for m in messages %}" + header.replace("role", "m.role") + "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}" + header.replace("{{ role }}", "assistant") + "{% endif %}"
    )
    config = {} if default == "unset" else {"enable_thinking_default": default}
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A")], columns, **config)
    prompt = only_prompt(dataset, tokenizer)
    assert item_ids(dataset, 0) == prompt.input_ids + tokenizer("A<|im_end|>\n")["input_ids"]
    if VERL >= (0, 8) and not columns:
        expected = {"unset": "undefined", None: "undefined", "none": "True", False: "False"}[default]
        assert f"user({expected})" in Decoder(tokenizer).readable(prompt.input_ids)


@pytest.mark.parametrize("override", [0, 1])
def test_message_level_loss_mask_does_not_move_the_prompt(tmp_path, tokenizer, override):
    """With verl 0.6, 1 puts the generation prompt among the ones, 0 leaves the last turn without any."""
    messages = talk("a?", "A", "b?", "B")
    messages = [message | {"loss_mask": int(message["role"] == "assistant")} for message in messages]
    messages[-1]["loss_mask"] = override
    dataset = multi_turn(tmp_path, tokenizer, [messages])
    if VERL[:2] == (0, 6):  # no other version reads it
        assert prompts_from_batch(first_batch(dataset), tokenizer, shifted=False)[0].reference != "B"
    prompt = only_prompt(dataset, tokenizer)
    assert (prompt.input_ids, prompt.reference) == (template_ids(tokenizer, messages[:3]), "B")


@pytest.mark.parametrize("pad_mode", ["right", pytest.param("no_padding", marks=since_verl_0_6)])
@pytest.mark.parametrize("truncation", ["right", "left", "error"])
def test_conversation_truncation(tmp_path, tokenizer, truncation, pad_mode):
    messages = talk("a?", "12345", "b?", "12345")
    whole = template_ids(tokenizer, messages[:3])
    rows = [messages, talk("a?", "A")]
    config = {"truncation": truncation, "pad_mode": pad_mode, "max_length": len(whole)}
    dataset = multi_turn(tmp_path, tokenizer, rows, **config)
    prompts, without_answer, _ = prompts_from_dataset(dataset, [0, 1], tokenizer)
    if truncation == "right" or pad_mode == "no_padding":
        assert ([prompt.row for prompt in prompts], without_answer) == ([1], [0])
    else:
        assert (prompts[0].input_ids, len(prompts), without_answer) == (whole, 2, [])
    if truncation != "error":  # so it is in the item
        kept = template_ids(tokenizer, messages, add_generation_prompt=False)
        assert item_ids(dataset, 0) == (whole if without_answer else kept[-len(whole) :])
    config["max_length"] += 1
    all_prompts(multi_turn(tmp_path, tokenizer, rows, **config), tokenizer)


def test_tokenizer_without_pad_token(tmp_path):
    write_model(tmp_path, hidden_size=8, num_hidden_layers=1, intermediate_size=8, pad_token=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token is None
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A"), talk("longer?", "B")])
    rows = all_prompts(dataset, tokenizer)
    assert [prompt.reference for prompt in rows] == ["A", "B"]
    batch = prompts_from_batch(first_batch(dataset), tokenizer, shifted=False)
    assert ids_and_references(batch) == ids_and_references(rows)


def test_a_row_that_is_drawn_twice_is_there_twice(tmp_path, tokenizer):
    dataset = multi_turn(tmp_path, tokenizer, [talk("a", "A"), talk("b", "B")])
    assert [prompt.row for prompt in prompts_from_dataset(dataset, [1, 0, 1], tokenizer).prompts] == [1, 0, 1]


@pytest.mark.parametrize("with_processor", [False, pytest.param(True, marks=since_verl_0_7)])
def test_nothing_is_changed(tokenizer, request, with_processor):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    dataset = multi_turn_in_memory(tokenizer, talk("a?", "A"))
    if with_processor:
        dataset.processor = request.getfixturevalue("processor")
        dataset.dataframe["images"] = [[]]  # all versions then make parts of strings
    batch = {"input_ids": torch.tensor([tokenizer("a?b")["input_ids"]]), "loss_mask": torch.tensor([[0, 0, 1]])}
    conversations = dataset.messages, dataset.dataframe["messages"].tolist()
    before = copy.deepcopy((conversations, batch)), tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side
    only_prompt(dataset, tokenizer)
    prompts_from_batch(batch, tokenizer, shifted=True)
    (old_conversations, old_batch), *tokenizer_state = before
    assert tokenizer_state == [tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side]
    assert (dataset.messages, dataset.dataframe["messages"].tolist()) == old_conversations
    assert batch.keys() == old_batch.keys()
    assert all(torch.equal(batch[key], old_batch[key]) for key in batch)


# Images and videos


@pytest.mark.parametrize("answer", ["A", [{"type": "text", "text": "A"}]])
@pytest.mark.parametrize("kind", ["image", "image_url", "video", "audio"])
def test_conversation_with_another_part_than_text_is_left_out(tokenizer, kind, answer):
    content = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: "somewhere"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    assert prompts_from_dataset(multi_turn_in_memory(tokenizer, messages), [0], tokenizer) == ([], [], [0])
    messages = [*talk("a?", "A", "b?"), {"role": "assistant", "content": content}]
    assert prompts_from_dataset(multi_turn_in_memory(tokenizer, messages), [0], tokenizer) == ([], [], [0])


@since_verl_0_7
@pytest.mark.parametrize("keys", [{}, {"image_key": "pictures", "video_key": "films"}])
def test_row_with_images_or_videos_is_left_out_and_they_are_not_loaded(tmp_path, tokenizer, processor, keys):
    nowhere = [{"image": "file:///nowhere.png"}]
    conversations = [talk("<image>?", "A"), talk("a?", "A"), talk("<video>?", "B")]
    columns = {
        keys.get("image_key", "images"): [nowhere, [], []],
        keys.get("video_key", "videos"): [[], [], [{"video": "file:///nowhere.mp4"}]],
    }
    dataset = multi_turn(tmp_path, tokenizer, conversations, columns, processor, **keys)
    prompts, without_answer, multi_modal = prompts_from_dataset(dataset, [2, 1, 0], tokenizer)
    assert ([prompt.row for prompt in prompts], without_answer, multi_modal) == ([1], [], [2, 0])


@since_verl_0_7
def test_empty_image_cell_is_no_image(tokenizer):
    """Of the cells that may be empty, verl itself takes only the empty list."""
    for nothing in ([], np.array([]), None, pd.NA, float("nan")):
        dataset = multi_turn_in_memory(tokenizer, talk("a?", "A"))
        dataset.dataframe["images"] = pd.Series([nothing], dtype=object)
        dataset._build_messages = lambda example: example["messages"]
        assert only_prompt(dataset, tokenizer).text == "a?"


@pytest.mark.skipif(VERL >= (0, 7), reason="verl >= 0.7 reads the column")
def test_image_column_that_verl_does_not_read_is_no_image(tmp_path, tokenizer):
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A")], {"images": [["a.png"]]})
    assert only_prompt(dataset, tokenizer).reference == "A"


@since_verl_0_7
@pytest.mark.parametrize("columns", [{}, {"images": [[], []]}])
@pytest.mark.parametrize("pad_mode", ["right", "no_padding"])
def test_text_of_a_vision_language_data_set_is_tokenized_by_the_processor(
    tmp_path, tokenizer, processor, columns, pad_mode
):
    conversations = [talk("a?", "A"), talk("a?", "A", "b?", " B", system="Be brief.")]
    if VERL < (0, 7, 1) and not columns:  # there, strings stay strings, and a processor takes none
        conversations = [[m | {"content": [{"type": "text", "text": m["content"]}]} for m in c] for c in conversations]
    dataset = multi_turn(tmp_path, tokenizer, conversations, columns, processor, pad_mode=pad_mode)
    short, long = all_prompts(dataset, tokenizer)
    assert item_ids(dataset, 0) == short.input_ids + tokenizer("A|<|im_end|>\n")["input_ids"]
    assert item_ids(dataset, 1) == long.input_ids + tokenizer(" B|<|im_end|>\n")["input_ids"]
    assert (short.text, short.reference, long.text, long.reference) == ("a?", "A|", "b?", "B|")
    assert (short.reference_text, long.reference_text) == ("A", "B")


# Other data sets


def test_custom_data_set_is_read_by_its_mask(tokenizer):
    ids = tokenizer("abcdef")["input_ids"]
    pads = [tokenizer.pad_token_id] * 2
    padded = {"input_ids": torch.tensor(pads + ids), "attention_mask": torch.tensor([0, 0] + [1] * 6)}
    dataset = Items(
        padded | {"loss_mask": torch.tensor([0, 0, 0, 1, 0, 0, 1, 1])},
        {"input_ids": ids, "loss_mask": [0, 0, 0, 1, 1, 0]},
        padded | {"loss_mask": torch.zeros(8)},
        padded,
        TensorDict({"input_ids": torch.tensor(ids), "loss_mask": torch.ones(6)}),
    )
    assert prompts_from_dataset(dataset, range(5), tokenizer) == DatasetPrompts(
        prompts=[
            Prompt(0, ids[:4], "abcd", "ef"),
            Prompt(1, ids[:3], "abc", "de"),
            Prompt(3, ids, "abcdef", None),
            Prompt(4, [], "", "abcdef"),
        ],
        without_answer=[2],
        multi_modal=[],
    )


@pytest.mark.parametrize(("turn", "spans"), [("last", [(5, 6)]), ("first", [(1, 3)]), ("all", [(1, 3), (5, 6)])])
def test_custom_data_set_is_split_at_the_runs_of_its_mask(tokenizer, turn, spans):
    ids = tokenizer("abcdef")["input_ids"]
    dataset = Items({"input_ids": ids, "loss_mask": [0, 1, 1, 0, 0, 1]})
    prompts = prompts_from_dataset(dataset, [0], tokenizer, turn=turn).prompts
    assert ids_and_references(prompts) == [(ids[:start], "abcdef"[start:end]) for start, end in spans]


@pytest.mark.parametrize("form", [dict, TensorDict])
@pytest.mark.parametrize("inputs", [IMAGES, NonTensorData(IMAGES), [IMAGES]])
def test_custom_item_with_multi_modal_inputs_is_left_out(tokenizer, form, inputs):
    item = {"input_ids": torch.arange(3), "loss_mask": torch.zeros(3), "multi_modal_inputs": inputs}
    dataset = Items(form(item))
    assert prompts_from_dataset(dataset, [0], tokenizer) == ([], [], [0])


@pytest.mark.parametrize("nothing", NO_IMAGES)
@pytest.mark.parametrize("wrap", [lambda value: value, NonTensorData])
def test_custom_item_without_images_is_read(tokenizer, nothing, wrap):
    item = {"input_ids": torch.arange(3), "loss_mask": torch.tensor([0, 1, 1]), "multi_modal_inputs": wrap(nothing)}
    assert only_prompt(Items(item), tokenizer).input_ids == [0]


@pytest.mark.parametrize("item", [(1, 2), {"text": "a"}, None])
def test_item_without_input_ids_is_named(tokenizer, item):
    with pytest.raises(ValueError, match=r"Items must be a mapping with `input_ids`, got"):
        prompts_from_dataset(Items(item), [0], tokenizer)
