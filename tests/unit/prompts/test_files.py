"""Prompts out of files: every form that is allowed, and an error that names the file for every other."""

from __future__ import annotations

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from unit.prompts.data import multi_turn_in_memory

from verl_valgen.prompts import files as own_prompts
from verl_valgen.prompts.datasets import prompts_from_dataset
from verl_valgen.prompts.files import read_own_prompts, tokenized
from verl_valgen.prompts.tokens import Decoder
from verl_valgen.records import origin
from verl_valgen.settings.checks import ConfigError, Mistakes

ASKED = [{"role": "user", "content": "2+2?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": " 4 "}]
LONG = [*ANSWERED, {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]


def read(tmp_path, rows, name="own.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_own_prompts(str(tmp_path / name), "generation_params")


def rendered(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_jsonl_texts_conversations_and_columns(tmp_path, tokenizer):
    rows = [
        "2+2?",
        ASKED,
        {"prompt": "2+2?", "reference": " 4\n", "data_source": "sums", "generation_params": {"top_k": 3}},
        {"messages": ANSWERED, "reward_model": {"ground_truth": "4"}, "extra_info": {"a": 1}},
        {"messages": ANSWERED, "reference": "four"},
    ]
    prompts = tokenized(read(tmp_path, rows), tokenizer, {}, "last")
    assert [prompt.input_ids for prompt in prompts] == [rendered(tokenizer, ASKED)] * 5
    assert {(prompt.row, prompt.text) for prompt in prompts} == {(None, "2+2?")}
    assert [prompt.reference for prompt in prompts] == [None, None, "4", "4", "four"]
    assert (prompts[2].data.data_source, prompts[2].data.params) == ("sums", {"top_k": 3})
    assert (prompts[3].data.ground_truth, prompts[3].data.extra_info) == ("4", {"a": 1})
    assert [prompt.stream for prompt in prompts] == [(1 << 31) + i for i in range(5)]
    assert [origin(prompt) for prompt in prompts] == [f"own.jsonl line {i}" for i in range(1, 6)]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [("last", [(3, "6")]), ("first", [(1, "4")]), ("all", [(1, "4"), (3, "6")])],
)
def test_the_turns_of_a_conversation_that_are_asked_for(tmp_path, tokenizer, turn, expected):
    prompts = tokenized(read(tmp_path, [LONG]), tokenizer, {}, turn)
    assert [(prompt.input_ids, prompt.reference) for prompt in prompts] == [
        (rendered(tokenizer, LONG[:end]), reference) for end, reference in expected
    ]


def test_a_conversation_that_ends_in_a_question_is_answered_there(tmp_path, tokenizer):
    (prompt,) = tokenized(read(tmp_path, [LONG[:3]]), tokenizer, {}, "all")
    assert (prompt.input_ids, prompt.text, prompt.reference) == (rendered(tokenizer, LONG[:3]), "3+3?", None)


def test_text_files_have_a_prompt_in_each_line(tmp_path, tokenizer):
    (tmp_path / "own.txt").write_text("one\n\n two \x0c three\n")
    prompts = tokenized(read_own_prompts(str(tmp_path / "own.txt"), ""), tokenizer, {}, "last")
    assert [prompt.text for prompt in prompts] == ["one", " two \x0c three"]
    assert [origin(prompt) for prompt in prompts] == ["own.txt line 1", "own.txt line 3"]


def test_parquet_has_rows_with_columns(tmp_path, tokenizer):
    rows = [
        {"prompt": "2+2?", "messages": None, "reference": "4", "generation_params": {"top_k": 3, "top_p": None}},
        {"prompt": None, "messages": ANSWERED, "reference": None, "generation_params": None},
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "own.parquet")
    prompts = tokenized(read_own_prompts(str(tmp_path / "own.parquet"), "generation_params"), tokenizer, {}, "last")
    assert [prompt.input_ids for prompt in prompts] == [rendered(tokenizer, ASKED)] * 2
    assert [prompt.reference for prompt in prompts] == ["4", "4"]
    assert prompts[0].data.params == {"top_k": 3, "top_p": None}
    assert [origin(prompt) for prompt in prompts] == ["own.parquet row 0", "own.parquet row 1"]


def test_integers_stay_integers_beside_an_empty_cell(tmp_path, tokenizer):
    numbers = pd.array([12345678901234567, None], dtype="Int64")
    pd.DataFrame({"prompt": ["a", "b"], "reference": numbers, "ground_truth": numbers}).to_parquet(
        tmp_path / "own.parquet"
    )
    first, second = read_own_prompts(str(tmp_path / "own.parquet"), "generation_params")
    assert (first.reference, first.data.ground_truth) == ("12345678901234567", 12345678901234567)
    assert (second.reference, second.data.ground_truth) == (None, None)


def test_template_arguments_and_tools_reach_the_template(tmp_path):
    seen = {}

    class Tokenizer:
        chat_template = "there is one"

        def apply_chat_template(self, messages, **kwargs):
            seen.update(kwargs, roles=[message["role"] for message in messages])
            return {"input_ids": torch.tensor([[1]])}

    row = {
        "messages": [
            *ASKED,
            {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
            {"role": "tool", "content": "4"},
        ],
        "tools": [{"type": "function"}],
        "enable_thinking": False,
    }
    tokenized(read(tmp_path, [row]), Tokenizer(), {"enable_thinking": True, "x": 1}, "last")
    assert seen == {
        "roles": ["user", "assistant", "tool"], "tools": [{"type": "function"}], "enable_thinking": False, "x": 1,
        "add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt",
    }  # fmt: skip


@pytest.mark.parametrize("content", [None, "Let me see."])
def test_a_last_turn_that_calls_a_tool_is_the_reference_as_in_a_data_set(tmp_path, tokenizer, content):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [*ASKED, {"role": "assistant", "content": content, "tool_calls": [call]}]
    (own,) = tokenized(read(tmp_path, [messages]), tokenizer, {}, "last")
    (from_dataset,) = prompts_from_dataset(multi_turn_in_memory(tokenizer, messages), [0], tokenizer).prompts
    assert own.reference.startswith(content or "<tool_call>")
    assert '"name": "add"' in own.reference
    assert (own.input_ids, own.text, own.reference) == (
        from_dataset.input_ids, from_dataset.text, from_dataset.reference
    )  # fmt: skip


def test_a_reference_of_the_rows_own_is_not_rendered(tmp_path, tokenizer):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}asked"
    messages = [*ASKED, {"role": "assistant", "content": ""}]
    (prompt,) = tokenized(read(tmp_path, [{"messages": messages, "reference": "4"}]), tokenizer, {}, "last")
    assert prompt.reference == "4"
    with pytest.raises(TemplateError, match="no"):
        tokenized(read(tmp_path, [messages]), tokenizer, {}, "last")


def test_what_the_template_refuses_is_told_with_file_and_line_and_the_rest_is_read(tmp_path, tokenizer):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'alien' %}{{ raise_exception('no\n\x1b aliens') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    alien = [{"role": "alien", "content": "x"}]
    mistakes = Mistakes()
    prompts = tokenized(read(tmp_path, ["a", alien, "b", alien]), tokenizer, {}, "last", mistakes)
    assert [(prompt.text, prompt.stream) for prompt in prompts] == [("a", 1 << 31), ("b", (1 << 31) + 2)]
    reason = "it cannot be rendered (TemplateError: no\\n\\x1b aliens)"
    assert mistakes.lines == [f"generation.prompts: {tmp_path}/own.jsonl, line {line}: {reason}" for line in (2, 4)]
    pd.DataFrame({"messages": [ASKED, alien]}).to_parquet(tmp_path / "own.parquet")
    mistakes = Mistakes()
    tokenized(read_own_prompts(str(tmp_path / "own.parquet"), ""), tokenizer, {}, "last", mistakes)
    assert mistakes.lines[0].startswith(f"generation.prompts: {tmp_path}/own.parquet, row 1 (from 0): it cannot be ren")


def function(name, **properties):
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def calls(name, **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "name": name},
    ]


def test_a_table_gives_the_same_prompts_as_lines(tmp_path, tokenizer):
    """Arrow gives every tool, call and message the keys of all others."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m.role }}"
        "{{ m.content if m.content is not none }}"
        "{{ m.tool_calls | tojson if m.tool_calls is defined else '-' }}{{ m.name if m.name is defined else '-' }}"
        "{% endfor %}"
    )
    rows = [
        {"messages": calls("clock", zone="UTC"), "tools": [function("clock", zone="string"), function("add", a="n")]},
        {"messages": calls("add", a=[1], b={"c": "d"}), "tools": [function("add", a="number")]},
        {"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"type": "x"}]}, {"role": "user", "content": "?"}]},
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "own.parquet")
    of_lines = tokenized(read(tmp_path, rows), tokenizer, {}, "last")
    of_table = tokenized(read_own_prompts(str(tmp_path / "own.parquet"), ""), tokenizer, {}, "last")
    assert [p.input_ids for p in of_table] == [p.input_ids for p in of_lines]
    assert "null" not in tokenizer.decode(of_table[0].input_ids)


def test_what_functions_of_a_reward_get_has_no_made_up_keys_either(tmp_path):
    rows = [
        {"prompt": "a", "extra_info": {"x": 1}, "reward_model": {"ground_truth": {"left": "1"}}},
        {"prompt": "b", "extra_info": {"y": "2"}, "reward_model": {"ground_truth": {"right": "2"}}},
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "own.parquet")
    prompts = read_own_prompts(str(tmp_path / "own.parquet"), "")
    assert [(one.data.extra_info, one.data.ground_truth) for one in prompts] == [
        ({"x": 1}, {"left": "1"}),
        ({"y": "2"}, {"right": "2"}),
    ]


def test_without_a_question_the_text_is_the_whole_prompt(tmp_path, tokenizer):
    messages = [{"role": "system", "content": "Say something."}]
    (prompt,) = tokenized(read(tmp_path, [messages]), tokenizer, {}, "last")
    assert prompt.text == Decoder(tokenizer).readable(rendered(tokenizer, messages))


def test_without_a_chat_template_a_text_is_the_prompt(tmp_path, tokenizer):
    class Plain:
        chat_template = None

        def __call__(self, text):
            return {"input_ids": [ord(char) for char in text]}

    (prompt,) = tokenized(read(tmp_path, ["ab"]), Plain(), {}, "last")
    assert prompt.input_ids == [97, 98]
    (prompt,) = tokenized(read(tmp_path, [ANSWERED]), Plain(), {}, "last")
    assert (prompt.text, prompt.reference) == ("2+2?", "4")
    with pytest.raises(ValueError, match="no chat template"):
        tokenized(read(tmp_path, [LONG]), Plain(), {}, "last")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.jsonl", None, "none.jsonl: there is no such file"),
        (".", None, "there is no such file"),
        ("x.csv", b"a", "x.csv must end in .jsonl, .parquet, .txt"),
        ("x.jsonl", b"", "x.jsonl holds no prompts"),
        ("x.txt", b"\n \n", "x.txt holds no prompts"),
        (
            "x.jsonl",
            b"{",
            "x.jsonl, line 1: it is no JSON (Expecting property name enclosed in double quotes: column 2)",
        ),
        ("x.jsonl", b'"a"\n\n["b" "c"]', "x.jsonl, line 3: it is no JSON (Expecting ',' delimiter: column 6)"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl, line 1: it is no JSON (maximum recursion depth exceeded"),
        ("x.txt", b"\xff\xfe", "x.txt cannot be read: 'utf-8' codec"),
        ("x.parquet", b"PAR1", "x.parquet cannot be read: "),
        ("x.jsonl", b'"a"\n3', "x.jsonl, line 2: it must be a text, a list of messages or a mapping, got 3"),
        ("x.jsonl", b'"a"\n\n \n3', "x.jsonl, line 4: it must be a text, a list of messages or a mapping, got 3"),
        ("x.jsonl", b'""', "line 1: `prompt` or `messages` must be a text or a list of messages of text, got ''"),
        ("x.jsonl", b"[]", "must be a text or a list of messages of text, got []"),
        ("x.jsonl", b'{"text": "a"}', "must be a text or a list of messages of text, got None"),
        ("x.jsonl", b'{"a": 1, "promt": "b"}', "x.jsonl, line 1: `promt` is unknown (did you mean `prompt`?)"),
        ("x.jsonl", b'{"prompt_id": 1, "Prompts": "b"}', "line 1: `Prompts` is unknown (did you mean `prompt`?)"),
        ("x.jsonl", b'{"message": []}', "line 1: `message` is unknown (did you mean `messages`?)"),
        ("x.jsonl", b'{"pro\\u001bmpt": "a"}', "line 1: `pro\\x1bmpt` is unknown (did you mean `prompt`?)"),
        ("x.jsonl", b'{"messages": null, "promt": "a"}', "must be a text or a list of messages of text, got None"),
        ("x.jsonl", b'[{"role": "user"}]', "must be a text or a list of messages of text"),
        ("x.jsonl", b'[{"role": "user", "content": [{"type": "image"}]}]', "must be a text or a list of messages of"),
        ("x.jsonl", b'{"prompt": "a", "reference": [4]}', "`reference` must be a text or a number, got [4]"),
        ("x.jsonl", b'"\\u001b[31m"\n{"prompt": ["\\u001b[31m"]}', "got ['\\x1b[31m']"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_own_prompts(str(tmp_path / name), "generation_params")
    assert str(caught.value).startswith("generation.prompts: ")
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": ["a", "b", ""]}, "x.parquet, row 2 (from 0): `prompt` or `messages` must be a text"),
        ({"promt": ["a"]}, "x.parquet, row 0 (from 0): `promt` is unknown (did you mean `prompt`?)"),
    ],
)
def test_a_row_of_a_table_is_named(tmp_path, columns, reason):
    pd.DataFrame(columns).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ConfigError) as caught:
        read_own_prompts(str(tmp_path / "x.parquet"), "generation_params")
    assert reason in str(caught.value)


def test_other_columns_are_allowed(tmp_path):
    (own,) = read(tmp_path, [{"prompt": "a", "promt": "b", "answer": "c", "messages_": "d"}])
    assert own.messages == [{"role": "user", "content": "a"}]


def test_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(own_prompts, "_MAX_PROMPTS", 2)
    with pytest.raises(ConfigError, match="must have at most 2 prompts"):
        read(tmp_path, ["a"] * 3)
    monkeypatch.setattr(own_prompts, "_MAX_BYTES", 1 << 20)
    (tmp_path / "big.txt").write_bytes(b"a" * (3 << 20))
    with pytest.raises(ConfigError, match="must have at most 1 MiB, got 3"):
        read_own_prompts(str(tmp_path / "big.txt"), "")


NAMES = st.sampled_from(["role", "content", "prompt", "messages", "reference", "text", "tool_calls"])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(rows=st.lists(ANY, min_size=1, max_size=3))
def test_any_json_is_read_or_refused(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any")
    try:
        num_read, refusal = len(read(path, rows)), ""
    except ConfigError as error:
        num_read, refusal = len(rows), str(error)
    assert num_read == len(rows)
    assert refusal.isprintable()


def test_arrays_as_parquet_gives_them(tmp_path):
    row = {"prompt": np.array([{"role": "user", "content": "a"}], dtype=object)}
    assert own_prompts._own_prompt(row, "").messages == [{"role": "user", "content": "a"}]
