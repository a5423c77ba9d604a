"""Whatever data sets, loaders, chat templates and files give: prompts as documented, or an error that is documented."""

from __future__ import annotations

import copy
import json

import pandas as pd
import pytest
import torch
from assets import CHAT_TEMPLATE, PRINTABLE
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from unit.prompts.data import multi_turn_in_memory

from verl_valgen.prompts import files as own_prompts
from verl_valgen.prompts.datasets import prompts_from_dataset
from verl_valgen.prompts.files import read_own_prompts, tokenized
from verl_valgen.prompts.masks import prompts_from_batch
from verl_valgen.prompts.tokens import Decoder
from verl_valgen.settings.checks import ConfigError

PROFILE = settings.get_profile("reliability")
TURNS = st.sampled_from(["last", "first", "all"])


# Masks and batches


@st.composite
def rows(draw):
    """Token ids, of any token, the special ones too, and a loss mask: any bits, all of them 0 or 1, or one answer."""
    ids = draw(st.lists(st.integers(0, 99), max_size=12))
    start = draw(st.integers(0, len(ids)))
    bits = st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids))
    usual = st.sampled_from([[0] * len(ids), [1] * len(ids), [0] * start + [1] * (len(ids) - start)])
    return ids, draw(bits | usual)


DTYPES = st.sampled_from([torch.long, torch.int32, torch.bool, torch.float32])


def nested_batch(some_rows, dtype):
    ids = [torch.tensor(ids, dtype=torch.long) for ids, _ in some_rows]
    masks = [torch.tensor(mask, dtype=dtype) for _, mask in some_rows]
    named = {"input_ids": ids, "loss_mask": masks}
    return {key: torch.nested.as_nested_tensor(value, layout=torch.jagged) for key, value in named.items()}


def padded_batch(some_rows, dtype, pad_id, num_left):
    """Each row with up to `num_left` paddings on its left, the others on its right."""
    width = max(len(ids) for ids, _ in some_rows) + num_left

    def padded(values, value):
        left = min(num_left, width - len(values))
        return [value] * left + values + [value] * (width - left - len(values))

    return {
        "input_ids": torch.tensor([padded(ids, pad_id) for ids, _ in some_rows]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in some_rows], dtype=dtype),
        # What a mask says of padding is nothing.
        "loss_mask": torch.tensor([padded(mask, 1) for _, mask in some_rows], dtype=dtype),
    }


def expected_split(mask):
    """Start and end of the last run of ones, by looking at the mask as text; both its length if there is none."""
    up_to_end = "".join(map(str, mask)).rstrip("0")
    return (len(up_to_end.rstrip("1")), len(up_to_end)) if up_to_end else (len(mask), len(mask))


@PROFILE
@given(some_rows=st.lists(rows(), min_size=1, max_size=4), dtype=DTYPES, num_left=st.integers(0, 9))
def test_padding_of_any_kind_changes_no_prompt(tokenizer, some_rows, dtype, num_left):
    from_nested = prompts_from_batch(nested_batch(some_rows, dtype), tokenizer, shifted=False)
    batch = padded_batch(some_rows, dtype, tokenizer.pad_token_id, num_left)
    assert prompts_from_batch(batch, tokenizer, shifted=False) == from_nested
    for (ids, mask), prompt in zip(some_rows, from_nested, strict=True):
        start, end = expected_split(mask)
        answer = Decoder(tokenizer).answer(ids[start:end], ids[:start]).strip() if end > start else None
        assert (prompt.input_ids, prompt.reference) == (ids[:start], answer)


@PROFILE
@given(data=st.data(), shifted=st.booleans(), num_rows=st.integers(0, 3), width=st.integers(0, 10))
def test_whatever_the_attention_a_prompt_begins_the_real_tokens(tokenizer, data, shifted, num_rows, width):
    def bits(high):
        one_row = st.lists(st.integers(0, high), min_size=width, max_size=width)
        drawn = data.draw(st.lists(one_row, min_size=num_rows, max_size=num_rows))
        return torch.tensor(drawn, dtype=torch.long).reshape(num_rows, width)

    ids, attention, mask = bits(99), bits(1), bits(1)
    batch = {"input_ids": ids, "attention_mask": attention, "loss_mask": mask}
    before = copy.deepcopy(batch)
    prompts = prompts_from_batch(batch, tokenizer, shifted=shifted)
    assert len(prompts) == num_rows
    for row, prompt in enumerate(prompts):
        is_real = attention[row].bool()
        real = ids[row][is_real].tolist()
        assert prompt.input_ids == real[: len(prompt.input_ids)]
        start, end = expected_split(mask[row][is_real].tolist())
        if not shifted:
            assert (prompt.input_ids, prompt.reference is None) == (real[:start], start == end)
    assert all(torch.equal(batch[key], before[key]) for key in batch)


@PROFILE
@given(data=st.data(), row=rows(), turn=TURNS, as_lists=st.booleans())
def test_a_data_set_of_somebodys_own_is_split_at_any_mask(tokenizer, data, row, turn, as_lists):
    ids, mask = row
    attention = data.draw(st.none() | st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    item = {"input_ids": ids, "loss_mask": mask} | ({} if attention is None else {"attention_mask": attention})
    item = item if as_lists else {key: torch.tensor(value) for key, value in item.items()}
    prompts, without_answer, multi_modal = prompts_from_dataset([item], [0], tokenizer, turn=turn)

    is_real = [1] * len(ids) if attention is None else attention
    real = [token for token, kept in zip(ids, is_real, strict=True) if kept]
    text = "".join(str(bit) for bit, kept in zip(mask, is_real, strict=True) if kept)
    starts = [i for i in range(len(text)) if text[i] == "1" and text[:i][-1:] != "1"]
    chosen = {"first": starts[:1], "last": starts[-1:], "all": starts}[turn]
    assert [prompt.input_ids for prompt in prompts] == [real[:start] for start in chosen]
    assert (without_answer, multi_modal) == ([] if starts else [0], [])


@PROFILE
@given(
    lengths=st.lists(st.integers(0, 6), min_size=3, max_size=3).filter(lambda lengths: len(set(lengths)) > 1),
    nested=st.booleans(),
)
def test_masks_of_another_length_are_refused_by_name(tokenizer, lengths, nested):
    keys = "input_ids", "attention_mask", "loss_mask"
    item = {key: torch.ones(length, dtype=torch.long) for key, length in zip(keys, lengths, strict=True)}
    with pytest.raises(ValueError, match=r"`(attention|loss)_mask` must be as long as `input_ids`, which has "):
        prompts_from_dataset([item], [0], tokenizer)
    batch = {key: tensor[None] for key, tensor in item.items()}
    if nested:
        batch = {key: torch.nested.as_nested_tensor([tensor], layout=torch.jagged) for key, tensor in item.items()}
    with pytest.raises(ValueError, match=r"`(attention|loss)_mask` must be as long as `input_ids`, which has "):
        prompts_from_batch(batch, tokenizer, shifted=False)


# Chat templates

HEADS = st.sampled_from(
    [
        "",
        "<|im_start|>",
        "{{ raise_exception('never') }}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no answer') }}{% endif %}",
    ]
)
BODIES = st.sampled_from(
    [
        "",
        "{{ m.role }}: {{ m.content }}\n",
        "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n",
        "{% if m.role != 'system' %}{{ m.content }}<|im_end|>{% endif %}",
        "{% if m.role == 'user' %}{{ m.content | upper }}{% endif %}",
        "<|pad|>{{ m.content }}<unk>",
        "{{ m.content.split('b')[-1] }}",
    ]
)
TAILS = st.sampled_from(
    [
        "",
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "assistant: ",
        "{% if add_generation_prompt %}{{ raise_exception('no prompt') }}{% endif %}",
        "{% if not add_generation_prompt %}the end{% endif %}",
    ]
)
TEMPLATES = st.builds("{}{{% for m in messages %}}{}{{% endfor %}}{}".format, HEADS, BODIES, TAILS)
# Text that spells special tokens, too.
CONTENTS = st.lists(st.sampled_from(["<|im_end|>", "<|pad|>", "<|im_start|>assistant\n", *PRINTABLE]), max_size=8).map(
    "".join
)


@st.composite
def conversations(draw):
    contents = draw(st.lists(CONTENTS, min_size=1, max_size=5))
    roles = draw(st.sampled_from([["user", "assistant"], ["system", "user", "assistant", "user", "assistant"]]))
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def with_template(tokenizer, template):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def rendered_ids(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answered(messages, turn):
    """Where the answers lie that `turn` asks for, in a conversation that need not have one."""
    places = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
    return {"first": places[:1], "last": places[-1:], "all": places}[turn] or [len(messages)]


@PROFILE
@given(messages=conversations(), template=TEMPLATES | st.just(CHAT_TEMPLATE), turn=TURNS)
@example([{"role": "user", "content": ""}], "", "last")
def test_any_chat_template_renders_the_prompt_or_raises_its_own_error(tokenizer, messages, template, turn):
    tokenizer = with_template(tokenizer, template)
    places = answered(messages, turn)
    expected_error = ""
    try:
        for place in places:
            rendered_ids(tokenizer, messages[:place])
            # For the reference of an answer that says nothing, the template is asked as well.
            if place < len(messages) and not messages[place]["content"]:
                tokenizer.apply_chat_template(messages[: place + 1], tokenize=False)
    except TemplateError as error:
        expected_error = str(error)
    dataset = multi_turn_in_memory(tokenizer, messages)
    if expected_error:
        with pytest.raises(TemplateError, match=expected_error):
            prompts_from_dataset(dataset, [0], tokenizer, turn=turn)
        return
    prompts = prompts_from_dataset(dataset, [0], tokenizer, turn=turn).prompts
    assert [prompt.input_ids for prompt in prompts] == [rendered_ids(tokenizer, messages[:i]) for i in places]
    for place, prompt in zip(places, prompts, strict=True):
        questions = [message["content"] for message in messages[:place] if message["role"] == "user"]
        assert not questions or prompt.text == questions[-1]
        if place == len(messages):
            assert prompt.reference is None
        elif messages[place]["content"]:
            assert prompt.reference == messages[place]["content"].strip()


@PROFILE
@given(template=TEMPLATES, row=rows().filter(lambda row: row[0]))
@example("", ([4, 5, 6], [0, 1, 0]))
def test_a_batch_is_split_whatever_the_chat_template_says_of_a_prompts_end(tokenizer, template, row):
    """Only of verl's single turns is the template asked, which must then render a question."""
    tokenizer = with_template(tokenizer, template)
    ids, mask = row
    batch = {"input_ids": torch.tensor([ids]), "loss_mask": torch.tensor([mask])}
    if "'never'" in template or "'no prompt'" in template:
        with pytest.raises(TemplateError, match=r"never|no prompt"):
            prompts_from_batch(batch, tokenizer, shifted=True)
        return
    (prompt,) = prompts_from_batch(batch, tokenizer, shifted=True)
    assert prompt.input_ids == ids[: len(prompt.input_ids)]


@PROFILE
@given(
    question=CONTENTS,
    answer=CONTENTS.filter(lambda text: "<|" not in text),
    num_left=st.integers(0, 3),
    is_shifted=st.booleans(),
)
def test_a_well_formed_conversation_comes_back(tokenizer, question, answer, num_left, is_shifted):
    """Rendered and masked as a trainer does it; shifted, as verl does with single turns, or not."""
    prompt_ids = rendered_ids(tokenizer, [{"role": "user", "content": question}])
    answer_ids = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    mask = [0] * (len(prompt_ids) - is_shifted) + [1] * len(answer_ids) + [0] * is_shifted
    batch = padded_batch([(prompt_ids + answer_ids, mask)], torch.long, tokenizer.pad_token_id, num_left)
    (prompt,) = prompts_from_batch(batch, tokenizer, shifted=is_shifted)
    assert (prompt.input_ids, prompt.reference) == (prompt_ids, answer.strip())


# Files of prompts

FIELDS = st.sampled_from(["role", "content", "prompt", "messages", "reference", "text", "tool_calls", "tools", "type"])
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=10)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | ANY_TEXT, inner, max_size=4),
    max_leaves=10,
)
ROLES = st.sampled_from(["user", "assistant", "system"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES | JSON, "content": ANY_TEXT | JSON}), max_size=3)
# Half of them as they should be, or nearly so.
PROMPTS = ANY_TEXT | MESSAGES | st.fixed_dictionaries({"prompt": ANY_TEXT | MESSAGES | JSON}) | JSON


def read_or_refused(path):
    """The prompts of a file, each of which can be asked, or [] where it is refused by name."""
    try:
        read = read_own_prompts(str(path), "generation_params")
    except ConfigError as error:
        message = str(error)
        assert message.startswith("generation.prompts: ")
        assert path.name in message
        assert message.isascii()
        assert message.isprintable()
        assert len(message) < 700
        return []
    assert read
    for own in read:
        assert own.messages
        assert own.reference is None or own.reference == own.reference.strip()
    return read


@PROFILE
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".jsonl", ".txt", ".parquet"]))
@example(b"PAR1" * 4, ".parquet")
@example(b"\x00", ".txt")
@example(b"[" * 100_000, ".jsonl")
@example(b'{"a":' * 990 + b"1" + b"}" * 990, ".jsonl")
def test_any_bytes_are_read_or_refused_with_the_files_name(tmp_path, content, suffix):
    path = tmp_path / f"own{suffix}"
    path.write_bytes(content)
    read_or_refused(path)


@PROFILE
@given(rows=st.lists(PROMPTS, max_size=3))
@example([{"prompt": "\ud800"}])
@example([[{"role": "\udfff", "content": "a"}]])
@example([{"prompt": "a", "tools": "b"}])
@example([{"prompt": "a", "tools": [{"b": "\ud800"}]}])
def test_any_json_is_read_row_by_row_and_can_be_asked_or_is_refused(tokenizer, tmp_path, rows):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_or_refused(path)
    assert len(read) in (0, len(rows))
    # A template that joins texts, as nearly all do, raises for parts and for what a message leaves out.
    plain = [own for own in read if all(isinstance(message["content"], str) for message in own.messages)]
    for prompt in tokenized(plain, with_template(tokenizer, CHAT_TEMPLATE), {}, "all"):
        assert all(0 <= token < len(tokenizer) for token in prompt.input_ids)


@PROFILE
@given(rows=st.lists(PROMPTS, min_size=1, max_size=3))
def test_any_table_is_read_or_refused_with_the_files_name(tmp_path, rows):
    path = tmp_path / "own.parquet"
    columns = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    try:
        pd.DataFrame(columns).to_parquet(path)
    except Exception:  # pandas and pyarrow have their own ideas of what a column may hold
        assume(False)
    assert len(read_or_refused(path)) in (0, len(rows))


@PROFILE
@given(num_prompts=st.integers(0, 6), num_bytes=st.integers(1, 4))
def test_a_file_is_refused_from_its_limits_on(tmp_path, num_prompts, num_bytes):
    path = tmp_path / "own.txt"
    path.write_bytes((b"a" * num_bytes + b"\n") * num_prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_prompts, "_MAX_PROMPTS", 4)
        patch.setattr(own_prompts, "_MAX_BYTES", 12)
        is_allowed = 0 < num_prompts <= 4 and path.stat().st_size <= 12
        assert len(read_or_refused(path)) == (num_prompts if is_allowed else 0)


@PROFILE
@given(name=st.text(st.characters(exclude_categories=()), max_size=300))
@example("\ud800.txt")
@example("x" * 300 + ".txt")
@example("\x00.txt")
def test_a_name_that_no_file_has_is_refused(name):
    with pytest.raises(ConfigError) as caught:
        read_own_prompts(f"/nowhere/{name}", "generation_params")
    assert str(caught.value).startswith("generation.prompts: /nowhere/")
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
