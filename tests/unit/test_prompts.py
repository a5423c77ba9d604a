"""Prompts of verl's own data sets, read from the rows and from the batches, against the chat template itself."""

from __future__ import annotations

import copy
from importlib.metadata import version

import pandas as pd
import pytest
import torch
from assets import PRINTABLE, SYSTEM_PROMPT, write_model, write_questions
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from packaging.version import Version
from tensordict import TensorDict
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer
from verl.utils.dataset import SFTDataset
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

from verl_valgen.prompts import decode, mask_is_shifted, prompts_from_batch, prompts_from_dataset
from verl_valgen.samples import Prompt

VERL = Version(version("verl")).release
since_verl_0_6 = pytest.mark.skipif(
    VERL < (0, 6), reason="verl 0.5's data sets know neither apply_chat_template_kwargs nor pad_mode"
)
MAX_LENGTH = 600
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_model(directory, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def rng_stays():
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state())


def single_turn(path, tokenizer, rows=None, cls=SFTDataset, **config):
    """verl's data set of (question, answer) pairs, from a parquet file in the directory `path`."""
    # verl's data set cannot be made from a file of one row.
    rows = rows or [("What is 1 plus 2?", "3"), ("Say ' hi ' , twice .", "hi  hi"), ("?", "")]
    pd.DataFrame(rows, columns=["question", "answer"]).to_parquet(path / "single.parquet")
    settings = {"prompt_key": "question", "response_key": "answer", "max_length": MAX_LENGTH} | config
    return cls(str(path / "single.parquet"), tokenizer, OmegaConf.create(settings))


def multi_turn(path, tokenizer, conversations, columns=None, **config):
    """verl's data set of conversations, from a parquet file in the directory `path`."""
    pd.DataFrame({"messages": conversations} | (columns or {})).to_parquet(path / "multi.parquet")
    config = OmegaConf.create({"max_length": MAX_LENGTH} | config)
    return MultiTurnSFTDataset(str(path / "multi.parquet"), tokenizer, config)


def talk(*contents, system=None):
    """User and assistant in turn, after a system message if there is one."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def template_ids(tokenizer, messages, **kwargs):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **kwargs)


def only_prompt(dataset, tokenizer, row=0):
    (prompt,), skipped = prompts_from_dataset(dataset, [row], tokenizer)
    assert skipped == []
    assert prompt.row == row
    return prompt


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


@pytest.mark.parametrize("multiturn", [False, True])
def test_assets_questions_are_read_by_verl(tmp_path, tokenizer, multiturn):
    train, val = write_questions(tmp_path, num_train=150, num_val=12, multiturn=multiturn)
    questions = pd.read_parquet(val)
    assert set(questions["question"]) <= set(pd.read_parquet(train)["question"])
    config = OmegaConf.create({"prompt_key": "question", "response_key": "answer", "max_length": MAX_LENGTH})
    dataset = (MultiTurnSFTDataset if multiturn else SFTDataset)(str(val), tokenizer, config)
    prompts, skipped = prompts_from_dataset(dataset, range(12), tokenizer)
    assert skipped == []
    assert [prompt.text for prompt in prompts] == questions["question"].tolist()
    assert [prompt.reference for prompt in prompts] == questions["answer"].tolist()
    assert any(SYSTEM_PROMPT in decode(tokenizer, p.input_ids, skip_special_tokens=True) for p in prompts) == multiturn


# Single turn


def test_single_turn_prompt_is_the_chat_template(tmp_path, tokenizer, rng_stays):
    dataset = single_turn(tmp_path, tokenizer)
    prompts, skipped = prompts_from_dataset(dataset, [2, 0, 1], tokenizer)
    assert skipped == []
    assert [prompt.row for prompt in prompts] == [2, 0, 1]
    for prompt in prompts:
        question, answer = dataset.prompts[prompt.row], dataset.responses[prompt.row]
        assert prompt.input_ids == template_ids(tokenizer, talk(question))
        assert (prompt.text, prompt.reference) == (question, answer)


@since_verl_0_6
def test_single_turn_passes_the_template_kwargs(tmp_path, tokenizer):
    dataset = single_turn(tmp_path, tokenizer, apply_chat_template_kwargs={"enable_thinking": False})
    prompt = only_prompt(dataset, tokenizer)
    assert prompt.input_ids == template_ids(tokenizer, talk(dataset.prompts[0]), enable_thinking=False)
    del dataset.apply_chat_template_kwargs  # as in verl 0.5
    assert only_prompt(dataset, tokenizer).input_ids == template_ids(tokenizer, talk(dataset.prompts[0]))


def test_single_turn_prompt_is_the_head_of_the_item(tmp_path, tokenizer):
    dataset = single_turn(tmp_path, tokenizer)
    for prompt in prompts_from_dataset(dataset, range(3), tokenizer)[0]:
        item = dataset[prompt.row]["input_ids"].tolist()
        assert item[: len(prompt.input_ids)] == prompt.input_ids


def test_single_turn_batch_equals_rows(tmp_path, tokenizer):
    dataset = single_turn(tmp_path, tokenizer, [("one?", "1"), ("two ?", " 2 . "), ("none?", "")])
    assert mask_is_shifted(dataset)
    batch = first_batch(dataset)
    prompts = prompts_from_batch(batch, tokenizer, shifted=True)
    assert [prompt.row for prompt in prompts] == [None] * 3
    assert ids_and_references(prompts) == ids_and_references(prompts_from_dataset(dataset, range(3), tokenizer)[0])


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


@pytest.mark.parametrize("num_kept", [-3, 0, 1, 2, 5])
def test_single_turn_right_truncation(tmp_path, tokenizer, num_kept):
    """`num_kept` tokens of the answer are left."""
    whole = template_ids(tokenizer, talk("one?"))
    config = {"truncation": "right", "max_length": len(whole) + num_kept}
    dataset = single_turn(tmp_path, tokenizer, [("one?", "12345678")] * 2, **config)
    prompts, skipped = prompts_from_dataset(dataset, [0], tokenizer)
    from_batch, _ = prompts_from_batch(first_batch(dataset), tokenizer, shifted=True)
    if num_kept > 0:
        assert ids_and_references(prompts) == [(whole, "12345678")]
        assert (from_batch.input_ids, from_batch.reference) == (whole, "12345678"[:num_kept])
    else:
        assert (prompts, skipped) == ([], [0])
        assert (from_batch.input_ids, from_batch.reference) == (whole[: len(whole) + num_kept], None)


def test_subclasses_are_known_by_their_getitem(tmp_path, tokenizer):
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


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_is_cut_before_the_last_assistant_turn(tmp_path, tokenizer, name, rng_stays):
    messages = CONVERSATIONS[name]
    turn = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    dataset = multi_turn(tmp_path, tokenizer, [messages])
    prompt = only_prompt(dataset, tokenizer)
    assert prompt.input_ids == template_ids(tokenizer, messages[:turn])
    assert prompt.reference == messages[turn]["content"].strip()
    assert prompt.text == [m["content"] for m in messages[:turn] if m["role"] == "user"][-1]
    batch = prompts_from_batch(first_batch(dataset), tokenizer, shifted=False)
    assert ids_and_references(batch) == ids_and_references([prompt])


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


def test_tools_and_their_messages(tmp_path, tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    conversation = [
        *talk("1 and 2?"),
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    dataset = multi_turn(tmp_path, tokenizer, [conversation, conversation[:2]], {"tools": [[TOOL, TOOL], [TOOL]]})
    answered, called = prompts_from_dataset(dataset, [0, 1], tokenizer)[0]
    assert answered.input_ids == template_ids(tokenizer, conversation[:4], tools=[TOOL, TOOL])
    assert answered.input_ids == dataset[0]["input_ids"][: len(answered.input_ids)].tolist()
    assert (answered.text, answered.reference) == ("1 and 2?", "It is 3.")
    assert called.input_ids == template_ids(tokenizer, conversation[:1], tools=[TOOL])
    assert called.reference.startswith('<tool_call>{"name": "add"')
    assert called.reference.count("<tool_call>") == 2


def test_enable_thinking_is_taken_from_its_column(tmp_path, tokenizer):
    columns = {"enable_thinking": [True, False]}
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A"), talk("a?", "A", "b?", "")], columns)
    thinking, hurried = prompts_from_dataset(dataset, [0, 1], tokenizer)[0]
    assert thinking.input_ids == template_ids(tokenizer, talk("a?"), enable_thinking=True)
    assert hurried.input_ids == template_ids(tokenizer, talk("a?", "A", "b?"), enable_thinking=False)
    assert len(template_ids(tokenizer, talk("a?", "A", "b?"))) < len(hurried.input_ids)
    assert [thinking.reference, hurried.reference] == ["A", ""]
    if VERL < (0, 7):  # later the mask counts the closed think block among the answer
        batch = prompts_from_batch(first_batch(dataset), tokenizer, shifted=False)
        assert ids_and_references(batch) == ids_and_references([thinking, hurried])


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


@pytest.mark.parametrize("later_verl", [False, True])
def test_enable_thinking_none_is_passed_as_the_version_passes_it(tmp_path, tokenizer, monkeypatch, later_verl):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}{{ 'yes' if enable_thinking is defined else 'no' }}"
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A")])
    if later_verl:
        monkeypatch.delattr(MultiTurnSFTDataset, "_process_message_tokens", raising=False)
    elif VERL >= (0, 7):
        pytest.skip("of verl <= 0.6")
    prompt = only_prompt(dataset, tokenizer)
    assert decode(tokenizer, prompt.input_ids, skip_special_tokens=False) == ("a?no" if later_verl else "a?yes")


def test_enable_thinking_default_of_later_verl(tmp_path, tokenizer):
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A")])
    dataset.enable_thinking_default = False
    assert only_prompt(dataset, tokenizer).input_ids == template_ids(tokenizer, talk("a?"), enable_thinking=False)


@since_verl_0_6
def test_conversation_passes_the_template_kwargs(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ greeting }}" + tokenizer.chat_template
    kwargs = {"greeting": "Hello."}
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A")], apply_chat_template_kwargs=kwargs)
    assert only_prompt(dataset, tokenizer).input_ids == template_ids(tokenizer, talk("a?"), **kwargs)


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
    prompts, skipped = prompts_from_dataset(multi_turn(tmp_path, tokenizer, rows, **config), [0, 1], tokenizer)
    if truncation == "right" or pad_mode == "no_padding":
        assert ([prompt.row for prompt in prompts], skipped) == ([1], [0])
    else:
        assert (prompts[0].input_ids, len(prompts), skipped) == (whole, 2, [])
    config["max_length"] += 1
    assert len(prompts_from_dataset(multi_turn(tmp_path, tokenizer, rows, **config), [0, 1], tokenizer)[0]) == 2


def test_tokenizer_without_pad_token(tmp_path):
    write_model(tmp_path, hidden_size=8, num_hidden_layers=1, intermediate_size=8, pad_token=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token is None
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A"), talk("longer?", "B")])
    rows = prompts_from_dataset(dataset, [0, 1], tokenizer)[0]
    assert [prompt.reference for prompt in rows] == ["A", "B"]
    batch = prompts_from_batch(first_batch(dataset), tokenizer, shifted=False)
    assert ids_and_references(batch) == ids_and_references(rows)


def test_nothing_is_changed(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A"), talk("a?", "A", "b?", "B")])
    batch = first_batch(dataset)
    before = copy.deepcopy((dataset.messages, batch)), tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side
    prompts_from_dataset(dataset, [0, 1], tokenizer)
    prompts_from_batch(batch, tokenizer, shifted=True)
    (messages, old_batch), *tokenizer_state = before
    assert tokenizer_state == [tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side]
    assert [list(conversation) for conversation in messages] == [
        list(conversation) for conversation in dataset.messages
    ]
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
    dataset = object.__new__(MultiTurnSFTDataset)
    vars(dataset).update(tokenizer=tokenizer, messages=[messages], tools=None, enable_thinking=None, max_length=8)
    vars(dataset).update(truncation="left", apply_chat_template_kwargs={})
    prompt = only_prompt(dataset, tokenizer)
    turn = len(messages) - 1 if len(messages) % 2 == 0 else len(messages) - 2
    assert prompt.input_ids == template_ids(tokenizer, messages[:turn])
    assert prompt.text == messages[turn - 1]["content"]
    assert isinstance(prompt.reference, str)


@pytest.mark.parametrize("content", [None, [], ["x"], [{"type": "image"}], [{"type": "text", "text": None}], 7])
def test_content_that_is_no_string_has_no_text(tmp_path, tokenizer, content):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    dataset = object.__new__(MultiTurnSFTDataset)
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    vars(dataset).update(tokenizer=tokenizer, messages=[messages], tools=None, enable_thinking=None, max_length=8)
    vars(dataset).update(truncation="left")
    assert only_prompt(dataset, tokenizer) == Prompt(0, tokenizer("user")["input_ids"], "", "assistant")


def test_parts_are_read_as_text(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}"
    parts = [{"type": "text", "text": "How many "}, {"type": "text", "text": "legs?"}]
    dataset = multi_turn(tmp_path, tokenizer, [[{"role": role, "content": parts} for role in ("user", "assistant")]])
    prompt = only_prompt(dataset, tokenizer)
    assert (prompt.text, prompt.reference) == ("How many legs?", "How many |legs?|")


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
    prompts, skipped = prompts_from_dataset(dataset, range(5), tokenizer)
    assert skipped == [2]
    assert prompts == [
        Prompt(0, ids[:4], "abcd", "ef"),
        Prompt(1, ids[:3], "abc", "de"),
        Prompt(3, ids, "abcdef", None),
        Prompt(4, [], "", "abcdef"),
    ]


@pytest.mark.parametrize("item", [(1, 2), {"text": "a"}, None])
def test_item_without_input_ids_is_named(tokenizer, item):
    with pytest.raises(ValueError, match=r"Items must be a mapping with `input_ids`, got"):
        prompts_from_dataset(Items(item), [0], tokenizer)


# Batches


@since_verl_0_6
def test_nested_batch_equals_rows(tmp_path, tokenizer):
    from verl.utils.dataset.dataset_utils import SFTTensorCollator

    conversations = [talk("a?", "A"), talk("longer?", "B", "c?", "C")]
    dataset = multi_turn(tmp_path, tokenizer, conversations, pad_mode="no_padding")
    batch = first_batch(dataset, collate_fn=SFTTensorCollator("no_padding"))
    assert batch["input_ids"].is_nested
    rows = prompts_from_dataset(dataset, [0, 1], tokenizer)[0]
    for form in (batch, TensorDict(batch, batch_size=[2])):
        assert ids_and_references(prompts_from_batch(form, tokenizer, shifted=False)) == ids_and_references(rows)


@pytest.mark.parametrize("shifted", [False, True])
def test_left_padded_batch_equals_rows(tmp_path, tokenizer, shifted):
    if shifted:
        dataset = single_turn(tmp_path, tokenizer)
    else:
        dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A"), talk("longer?", "B"), talk("c?", "C")])
    batch = first_batch(dataset)
    for row in range(3):
        padding = int((batch["attention_mask"][row] == 0).sum())
        for tensor in batch.values():
            tensor[row] = tensor[row].roll(padding)
    assert not batch["attention_mask"][0, 0]
    rows = prompts_from_dataset(dataset, range(3), tokenizer)[0]
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
