"""Prompts of verl's own data sets, read from the rows and from the batches, against the chat template itself."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import verl
from assets import PRINTABLE, SYSTEM_PROMPT, write_model, write_questions
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from packaging.version import Version
from tensordict import NonTensorData, TensorDict
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, LlavaProcessor
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

from verl_valgen.prompts.datasets import DatasetPrompts, mask_is_shifted, prompts_from_dataset
from verl_valgen.prompts.masks import prompts_from_batch
from verl_valgen.prompts.tokens import decode
from verl_valgen.records import Prompt, RowData

try:
    from verl.utils.dataset import SFTDataset
except ImportError:
    SFTDataset = None

VERL = Version(verl.__version__).release
needs_sft_dataset = pytest.mark.skipif(SFTDataset is None, reason="verl >= 0.7.1 has no SFTDataset")
since_verl_0_6 = pytest.mark.skipif(
    VERL < (0, 6), reason="verl 0.5's data sets know neither apply_chat_template_kwargs nor pad_mode"
)
since_verl_0_7 = pytest.mark.skipif(VERL < (0, 7), reason="verl <= 0.6's data sets know only text")
MAX_LENGTH = 600
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}


@pytest.fixture
def rng_stays():
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture
def processor(tokenizer):
    """A vision-language model's processor, whose template sets a bar after every part of a content."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil as ImageProcessor,
        )
    except ImportError:  # transformers < 5
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as ImageProcessor
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for part in m.content %}{{ part.text }}|{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    # Qwen2VLProcessor asks for a video processor, and that for torchvision.
    return LlavaProcessor(ImageProcessor(), copy.deepcopy(tokenizer), patch_size=14, chat_template=template)


def single_turn(path, tokenizer, rows=None, cls=SFTDataset, **config):
    """verl's data set of (question, answer) pairs, from a parquet file in the directory `path`."""
    # verl's data set cannot be made from a file of one row.
    rows = rows or [("What is 1 plus 2?", "3"), ("Say ' hi ' , twice .", "hi  hi"), ("?", "")]
    pd.DataFrame(rows, columns=["question", "answer"]).to_parquet(path / "single.parquet")
    settings = {"prompt_key": "question", "response_key": "answer", "max_length": MAX_LENGTH} | config
    return cls(str(path / "single.parquet"), tokenizer, OmegaConf.create(settings))


def multi_turn(path, tokenizer, conversations, columns=None, processor=None, cls=MultiTurnSFTDataset, **config):
    """verl's data set of conversations, from a parquet file in the directory `path`."""
    pd.DataFrame({"messages": conversations} | (columns or {})).to_parquet(path / "multi.parquet")
    config = OmegaConf.create({"max_length": MAX_LENGTH} | config)
    kwargs = {} if processor is None else {"processor": processor}
    return cls(str(path / "multi.parquet"), tokenizer, config, **kwargs)


def multi_turn_in_memory(tokenizer, messages):
    """verl's data set of one conversation, which parquet could not hold or would change."""
    dataset = object.__new__(MultiTurnSFTDataset)
    frame = pd.DataFrame({"messages": [messages]})
    vars(dataset).update(tokenizer=tokenizer, messages=[messages], tools=None, enable_thinking=None, max_length=8)
    vars(dataset).update(truncation="left", apply_chat_template_kwargs={}, processor=None, dataframe=frame)
    vars(dataset).update(messages_key="messages", image_key="images", video_key="videos")
    return dataset


def talk(*contents, system=None):
    """User and assistant in turn, after a system message if there is one."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def template_ids(tokenizer, messages, **kwargs):
    kwargs = {"add_generation_prompt": True} | kwargs
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)


def all_prompts(dataset, tokenizer, rows=None):
    prompts, without_answer, multi_modal = prompts_from_dataset(dataset, rows or range(len(dataset)), tokenizer)
    assert (without_answer, multi_modal) == ([], [])
    return prompts


def only_prompt(dataset, tokenizer, row=0):
    (prompt,) = all_prompts(dataset, tokenizer, [row])
    assert prompt.row == row
    return prompt


def item_ids(dataset, row):
    """The tokens of verl's own item, without padding."""
    item = dataset[row]
    ids = item["input_ids"]
    return ids[item["attention_mask"].bool()].tolist() if "attention_mask" in item else ids.tolist()


def first_batch(dataset, **kwargs):
    loader = DataLoader(dataset, batch_size=len(dataset), generator=torch.Generator(), **kwargs)
    return next(iter(loader))


def ids_and_references(prompts):
    return [(prompt.input_ids, prompt.reference) for prompt in prompts]


# What the assets promise, as far as prompts rest on it


def test_assets_tokenizer_gives_back_the_text(tokenizer):
    text = PRINTABLE + " a , b . isn't\n\n  x"
    assert decode(tokenizer, tokenizer(text)["input_ids"], skip_special_tokens=False) == text


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
    assert any(SYSTEM_PROMPT in decode(tokenizer, p.input_ids, skip_special_tokens=True) for p in prompts) == multiturn


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
        assert ids_and_references(prompts) == [(whole, "12345678")]
        assert (from_batch.input_ids, from_batch.reference) == (whole, "12345678"[:num_kept])
    else:
        assert (prompts, without_answer) == ([], [0])
        assert (from_batch.input_ids, from_batch.reference) == (whole[: len(whole) + num_kept], None)


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

CONVERSATIONS = {
    "one turn": talk("What is 1 plus 2?", "3"),
    "two turns": talk("a?", "A", "b ?", " B . "),
    "system": talk("a?", "A", "b?", "B", system="Be brief."),
    "ends with the user": talk("a?", "A", "b?", "B", "thanks"),
    "two assistants in a row": [*talk("a?", "A"), {"role": "assistant", "content": "B"}],
}


@pytest.mark.parametrize("pad_mode", ["right", pytest.param("no_padding", marks=since_verl_0_6)])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_is_cut_before_the_last_assistant_turn(tmp_path, tokenizer, name, pad_mode, rng_stays):
    messages = CONVERSATIONS[name]
    turn = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    dataset = multi_turn(tmp_path, tokenizer, [messages], pad_mode=pad_mode)
    assert not mask_is_shifted(dataset)
    prompt = only_prompt(dataset, tokenizer)
    assert prompt.input_ids == template_ids(tokenizer, messages[:turn])
    assert prompt.reference == messages[turn]["content"].strip()
    assert prompt.text == [m["content"] for m in messages[:turn] if m["role"] == "user"][-1]
    batch = prompts_from_batch(first_batch(dataset), tokenizer, shifted=False)
    assert ids_and_references(batch) == ids_and_references([prompt])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_prompt_and_answer_are_the_item(tmp_path, tokenizer, name):
    messages = CONVERSATIONS[name]
    dataset = multi_turn(tmp_path, tokenizer, [messages])
    prompt = only_prompt(dataset, tokenizer)
    turn = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    answer = tokenizer(messages[turn]["content"] + "<|im_end|>\n")["input_ids"]
    up_to_answer = item_ids(dataset, 0)[: len(prompt.input_ids) + len(answer)]
    assert up_to_answer == prompt.input_ids + answer
    assert (up_to_answer == item_ids(dataset, 0)) == (turn == len(messages) - 1)


@pytest.mark.parametrize("start", ["user", "assistant"])
def test_conversation_of_one_message_is_all_prompt(tmp_path, tokenizer, start):
    messages = [{"role": start, "content": "hm"}]
    prompt = only_prompt(multi_turn(tmp_path, tokenizer, [messages]), tokenizer)
    assert (prompt.input_ids, prompt.reference) == (template_ids(tokenizer, messages), None)
    assert "hm" in prompt.text


def test_conversation_may_open_with_the_assistant(tmp_path, tokenizer):
    messages = [{"role": "assistant", "content": "hello"}, *talk("a?", "A")]
    prompt = only_prompt(multi_turn(tmp_path, tokenizer, [messages]), tokenizer)
    assert (prompt.input_ids, prompt.reference) == (template_ids(tokenizer, messages[:2]), "A")


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


def test_tools_and_their_messages(tmp_path, tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    conversation = [
        *talk("1 and 2?"),
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    announced = [conversation[0], conversation[1] | {"content": "Let me see."}]
    tools = [[TOOL, TOOL], [TOOL], [TOOL]]
    dataset = multi_turn(tmp_path, tokenizer, [conversation, conversation[:2], announced], {"tools": tools})
    answered, called, announcing = all_prompts(dataset, tokenizer)
    assert answered.input_ids == template_ids(tokenizer, conversation[:4], tools=[TOOL, TOOL])
    assert item_ids(dataset, 0) == answered.input_ids + tokenizer("It is 3.<|im_end|>\n")["input_ids"]
    assert (answered.text, answered.reference) == ("1 and 2?", "It is 3.")
    assert called.input_ids == template_ids(tokenizer, conversation[:1], tools=[TOOL])
    assert called.reference.startswith('<tool_call>{"name": "add"')
    assert called.reference.count("<tool_call>") == 2
    assert announcing.reference == "Let me see." + called.reference
    assert item_ids(dataset, 1) == called.input_ids + tokenizer(called.reference + "<|im_end|>\n")["input_ids"]


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


def test_answer_begins_where_the_template_leaves_its_generation_prompt(tmp_path, tokenizer):
    """A reasoning model's generation prompt opens a think block that a rendered answer does not have."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or 'call' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    conversation = [*talk("a?"), {"role": "assistant", "content": None}]
    prompt = only_prompt(multi_turn(tmp_path, tokenizer, [conversation]), tokenizer)
    assert decode(tokenizer, prompt.input_ids, skip_special_tokens=False).endswith("assistant\n<think>\n")
    assert prompt.reference == "call"


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
        assert f"user({expected})" in decode(tokenizer, prompt.input_ids, skip_special_tokens=True)


@since_verl_0_6
def test_conversation_passes_the_template_kwargs(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ greeting }}" + tokenizer.chat_template
    kwargs = {"greeting": "Hello."}
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A")], apply_chat_template_kwargs=kwargs)
    prompt = only_prompt(dataset, tokenizer)
    assert prompt.input_ids == template_ids(tokenizer, talk("a?"), **kwargs)
    if VERL[:2] != (0, 7):  # which takes a message's beginning away as it is without them, and then refuses the item
        assert item_ids(dataset, 0) == prompt.input_ids + tokenizer("A<|im_end|>\n")["input_ids"]


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


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text() | st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "{{ 1/0 }}"]), min_size=2, max_size=5
    )
)
def test_hostile_content_never_raises(tokenizer, contents):
    messages = talk(*contents)
    prompt = only_prompt(multi_turn_in_memory(tokenizer, messages), tokenizer)
    turn = len(messages) - 1 if len(messages) % 2 == 0 else len(messages) - 2
    assert prompt.input_ids == template_ids(tokenizer, messages[:turn])
    assert prompt.text == messages[turn - 1]["content"]
    assert isinstance(prompt.reference, str)


@pytest.mark.parametrize("content", [None, [], ["x"], [{"type": "text", "text": None}], [{"type": None}], 7])
def test_content_that_is_no_string_has_no_text(tokenizer, content):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    prompt = only_prompt(multi_turn_in_memory(tokenizer, messages), tokenizer)
    assert prompt == Prompt(0, tokenizer("user")["input_ids"], "", "assistant")


def test_parts_are_read_as_text(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}"
    parts = [{"type": "text", "text": "How many "}, {"type": "text", "text": "legs?"}]
    dataset = multi_turn(tmp_path, tokenizer, [[{"role": role, "content": parts} for role in ("user", "assistant")]])
    prompt = only_prompt(dataset, tokenizer)
    assert prompt.input_ids == tokenizer("How many |legs?|")["input_ids"]
    assert (prompt.text, prompt.reference) == ("How many legs?", "How many legs?")


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
    assert (short.text, short.reference, long.text, long.reference) == ("a?", "A", "b?", "B")


# Which turns, and what else a row says

ALL_TURNS = talk("a?", "A", "b?", "B", "c?", "C", system="brief")


@pytest.mark.parametrize(("turn", "ends"), [("last", [6]), ("first", [2]), ("all", [2, 4, 6])])
def test_the_turns_that_are_asked_for(tmp_path, tokenizer, turn, ends, rng_stays):
    dataset = multi_turn(tmp_path, tokenizer, [ALL_TURNS, talk("d?", "D")])
    found = prompts_from_dataset(dataset, [0, 1], tokenizer, turn=turn).prompts
    expected = [(template_ids(tokenizer, ALL_TURNS[:end]), ALL_TURNS[end]["content"]) for end in ends]
    assert ids_and_references(found[:-1]) == expected
    assert [prompt.text for prompt in found[:-1]] == [ALL_TURNS[end - 1]["content"] for end in ends]
    assert (found[-1].row, found[-1].reference) == (1, "D")


def test_an_earlier_turn_has_tools_and_thinking_too(tmp_path, tokenizer):
    conversation = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "wait"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
    columns = {"tools": [[TOOL], [TOOL]], "enable_thinking": [False, True]}
    dataset = multi_turn(tmp_path, tokenizer, [conversation, conversation], columns)
    for row, thinking in enumerate(columns["enable_thinking"]):
        found = prompts_from_dataset(dataset, [row], tokenizer, turn="all").prompts
        kwargs = {"tools": [TOOL], "enable_thinking": thinking}
        assert ids_and_references(found) == [
            (template_ids(tokenizer, conversation[:end], **kwargs), conversation[end]["content"]) for end in (1, 3)
        ]


def test_of_a_cut_conversation_the_turns_that_are_left(tmp_path, tokenizer):
    length = len(template_ids(tokenizer, ALL_TURNS[:4])) + 1
    dataset = multi_turn(tmp_path, tokenizer, [ALL_TURNS], max_length=length, truncation="right")
    assert [prompt.reference for prompt in prompts_from_dataset(dataset, [0], tokenizer, turn="all").prompts] == [
        "A",
        "B",
    ]
    assert prompts_from_dataset(dataset, [0], tokenizer, turn="last") == DatasetPrompts([], [0], [])


def test_what_a_row_says_beside_its_prompt(tmp_path, tokenizer):
    columns = {
        "data_source": ["openai/gsm8k", None],
        "reward_model": [{"ground_truth": "18", "style": "rule"}, None],
        "extra_info": [{"index": 3, "tags": ["x"]}, None],
        "how": [{"top_k": 3, "top_p": None}, None],
    }
    dataset = multi_turn(tmp_path, tokenizer, [talk("a", "A"), talk("b", "B")], columns)
    first, second = prompts_from_dataset(dataset, [0, 1], tokenizer, params_key="how").prompts
    assert first.data == RowData("openai/gsm8k", "18", {"index": 3, "tags": ["x"]}, {"top_k": 3, "top_p": None})
    assert second.data == RowData()
    assert prompts_from_dataset(dataset, [0], tokenizer).prompts[0].data.params is None


def test_a_row_that_is_drawn_twice_is_there_twice(tmp_path, tokenizer):
    dataset = multi_turn(tmp_path, tokenizer, [talk("a", "A"), talk("b", "B")])
    assert [prompt.row for prompt in prompts_from_dataset(dataset, [1, 0, 1], tokenizer).prompts] == [1, 0, 1]


# Other data sets


class Items(Dataset):
    """Somebody's own data set: it returns what it is given."""

    def __init__(self, *items):
        self.items = items

    def __getitem__(self, item):
        return self.items[item]

    def __len__(self):
        return len(self.items)


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
def test_of_a_custom_data_set_the_runs_of_its_mask(tokenizer, turn, spans):
    ids = tokenizer("abcdef")["input_ids"]
    dataset = Items({"input_ids": ids, "loss_mask": [0, 1, 1, 0, 0, 1]})
    found = prompts_from_dataset(dataset, [0], tokenizer, turn=turn).prompts
    assert ids_and_references(found) == [(ids[:start], "abcdef"[start:end]) for start, end in spans]


IMAGES = {"pixel_values": torch.ones(4, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}
NO_IMAGES = [None, {}, {"token_type_ids": torch.zeros(1, 3)}, {"mm_token_type_ids": torch.zeros(1, 3)}]


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


# Batches


def verls_collator(pad_mode):
    return pytest.importorskip("verl.utils.dataset.dataset_utils").SFTTensorCollator(pad_mode)


def batch_forms(batch):
    """The batch as the collator gives it, in a TensorDict, and in the one that verl's trainer puts it into."""
    yield batch
    yield TensorDict(batch, batch_size=[len(batch["input_ids"])])
    if VERL >= (0, 7) and not isinstance(batch.get("multi_modal_inputs"), dict):  # verl refuses a dict
        from verl.utils.tensordict_utils import get_tensordict

        yield get_tensordict(batch, {"pad_mode": "no_padding"})


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
