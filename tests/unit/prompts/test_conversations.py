"""Conversations become prompts, texts and references, against the chat template itself."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.prompts.data import (
    TOOL,
    VERL,
    all_prompts,
    first_batch,
    ids_and_references,
    item_ids,
    multi_turn,
    multi_turn_in_memory,
    only_prompt,
    since_verl_0_6,
    talk,
    template_ids,
)

from verl_valgen.prompts.datasets import DatasetPrompts, mask_is_shifted, prompts_from_dataset
from verl_valgen.prompts.differences import NOT_TRAINED
from verl_valgen.prompts.files import OwnPrompt, tokenized
from verl_valgen.prompts.masks import prompts_from_batch
from verl_valgen.prompts.tokens import Decoder
from verl_valgen.records import Prompt, RowData

CONVERSATIONS = {
    "one turn": talk("What is 1 plus 2?", "3"),
    "two turns": talk("a?", "A", "b ?", " B . "),
    "system": talk("a?", "A", "b?", "B", system="Be brief."),
    "ends with the user": talk("a?", "A", "b?", "B", "thanks"),
    "two assistants in a row": [*talk("a?", "A"), {"role": "assistant", "content": "B"}],
}
ALL_TURNS = talk("a?", "A", "b?", "B", "c?", "C", system="brief")


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


def test_answer_begins_where_the_template_leaves_its_generation_prompt(tmp_path, tokenizer):
    """A reasoning model's generation prompt opens a think block that a rendered answer does not have."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or 'call' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    conversation = [*talk("a?"), {"role": "assistant", "content": None}]
    dataset = multi_turn(tmp_path, tokenizer, [conversation])
    prompt = only_prompt(dataset, tokenizer)
    assert Decoder(tokenizer).whole(prompt.input_ids).endswith("assistant\n<think>\n")
    (own,) = tokenized([OwnPrompt(conversation, None, {}, RowData())], tokenizer, {}, "last")
    assert (own.input_ids, own.reference) == (prompt.input_ids, "call")
    # verl takes as much from the answer as the generation prompt has beyond it: characters until 0.6, tokens since.
    if VERL < (0, 7):
        assert (prompt.reference, prompt.reference_text) == ("_end|>", "call")
    else:
        assert (prompt.reference, prompt.differences) == ("call", (NOT_TRAINED,))


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
    assert (prompt.text, prompt.reference, prompt.reference_text) == (
        *("How many legs?", "How many |legs?|"),
        "How many legs?",
    )


@pytest.mark.parametrize(("turn", "ends"), [("last", [6]), ("first", [2]), ("all", [2, 4, 6])])
def test_the_turns_that_are_asked_for(tmp_path, tokenizer, turn, ends, rng_stays):
    dataset = multi_turn(tmp_path, tokenizer, [ALL_TURNS, talk("d?", "D")])
    prompts = prompts_from_dataset(dataset, [0, 1], tokenizer, turn=turn).prompts
    expected = [(template_ids(tokenizer, ALL_TURNS[:end]), ALL_TURNS[end]["content"]) for end in ends]
    assert ids_and_references(prompts[:-1]) == expected
    assert [prompt.text for prompt in prompts[:-1]] == [ALL_TURNS[end - 1]["content"] for end in ends]
    assert (prompts[-1].row, prompts[-1].reference) == (1, "D")


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
        prompts = prompts_from_dataset(dataset, [row], tokenizer, turn="all").prompts
        kwargs = {"tools": [TOOL], "enable_thinking": thinking}
        assert ids_and_references(prompts) == [
            (template_ids(tokenizer, conversation[:end], **kwargs), conversation[end]["content"]) for end in (1, 3)
        ]


def test_the_turns_that_are_left_of_a_cut_conversation(tmp_path, tokenizer):
    length = len(template_ids(tokenizer, ALL_TURNS[:4])) + 1
    dataset = multi_turn(tmp_path, tokenizer, [ALL_TURNS], max_length=length, truncation="right")
    assert [prompt.reference for prompt in prompts_from_dataset(dataset, [0], tokenizer, turn="all").prompts] == [
        "A",
        "B",
    ]
    assert prompts_from_dataset(dataset, [0], tokenizer, turn="last") == DatasetPrompts([], [0], [])


@pytest.mark.parametrize(
    ("messages", "tools", "expected"),
    [
        (talk("a?", "A"), None, ""),
        (talk("a?", "A", system="brief"), [], ""),
        (talk("a?", "A", "b?", "B", "c?", "C"), None, "3 turns"),
        (talk("a?", "A"), [TOOL], "1 tool"),
        (talk("a?", "A", "b?", "B", "thanks"), [TOOL, TOOL], "2 turns, 2 tools"),  # what is given ends before `B`
    ],
)
def test_what_the_last_question_does_not_show_is_told(tokenizer, messages, tools, expected):
    dataset = multi_turn_in_memory(tokenizer, messages)
    dataset.tools = [tools]
    from_data = only_prompt(dataset, tokenizer)
    answered = messages if messages[-1]["role"] == "assistant" else messages[:-1]
    own = OwnPrompt(answered, None, {"tools": tools}, RowData())
    (from_file,) = tokenized([own], tokenizer, {}, "last")
    assert (from_data.not_shown, from_file.not_shown) == (expected, expected)
