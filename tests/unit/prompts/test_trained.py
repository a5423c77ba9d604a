"""References are what verl trains, under the chat templates of many models, and what is not trained is named."""

from __future__ import annotations

import logging

import pytest
from unit.prompts.data import (
    TOOL,
    VERL,
    Items,
    item_ids,
    multi_turn,
    multi_turn_in_memory,
    needs_sft_dataset,
    only_prompt,
    single_turn,
    talk,
)
from unit.prompts.templates import FAMILIES, tokenizer_of

from verl_valgen.prompts import differences as ways
from verl_valgen.prompts import trained
from verl_valgen.prompts.datasets import prompts_from_dataset
from verl_valgen.prompts.differences import warn_of_differences
from verl_valgen.prompts.tokens import Decoder
from verl_valgen.records import Prompt

BY_TURN = VERL >= (0, 7)
"""verl >= 0.7 renders each message alone, earlier ones all messages up to it."""
THOUGHT = "<think>\nsum\n</think>\n\n14"
EARLIER = "<think>\none and one\n</think>\n\n2"
CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
WITH_TOOLS = [
    *talk("1 and 2?"),
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "<think>\nok\n</think>\n\nIt is 3."},
]
CONVERSATIONS = {
    "plain": (talk("7+7?", "14"), {}),
    "thought": (talk("7+7?", THOUGHT), {}),
    "two turns": (talk("1+1?", EARLIER, "7+7?", THOUGHT), {}),
    "quick": (talk("7+7?", "14"), {"enable_thinking": [False]}),
    "two quick turns": (talk("1+1?", "2", "7+7?", "14"), {"enable_thinking": [False]}),
    "slow": (talk("7+7?", THOUGHT), {"enable_thinking": [True]}),
    "tools": (WITH_TOOLS, {"tools": [[TOOL]]}),
}


def dataset_of(tmp_path, tokenizer, conversation, columns=None, **config):
    return multi_turn(tmp_path, tokenizer, [conversation], columns, ignore_input_ids_mismatch=True, **config)


def prompts_of(dataset, tokenizer, family, turn="last"):
    ends = tokenizer.convert_tokens_to_ids([family.end] if family.end else [])
    return prompts_from_dataset(dataset, [0], tokenizer, turn=turn, end_ids=ends).prompts


def cases():
    for name in FAMILIES:
        for conversation in CONVERSATIONS:
            if (name, conversation) != ("Mistral", "tools") and not (BY_TURN and name == "Mistral"):
                yield name, conversation  # Mistral's refuses what verl >= 0.7 asks it for, and tools


@pytest.mark.parametrize(("name", "conversation"), list(cases()))
def test_the_reference_is_the_last_run_of_the_loss_mask(tmp_path, tokenizer, name, conversation, rng_stays):
    family = FAMILIES[name]
    made = tokenizer_of(family, tokenizer)
    dataset = dataset_of(tmp_path, made, *CONVERSATIONS[conversation])
    prompt = prompts_of(dataset, made, family)[-1]
    item = dataset[0]
    mask = [bool(bit) for bit in item["loss_mask"].tolist()]
    end = len(mask) - mask[::-1].index(True)
    start = next((i + 1 for i in range(end - 1, -1, -1) if not mask[i]), 0)
    text = Decoder(made).whole(item["input_ids"][start:end].tolist())
    asked = Decoder(made).whole(prompt.input_ids)
    # A think block that is closed in the prompt may be trained as part of the answer.
    in_both = max(size for size in range(len(text) + 1) if asked.endswith(text[:size]))
    text = text[in_both:] if in_both > 1 else text
    kept = made.convert_tokens_to_ids(family.end) if family.end else None
    assert prompt.reference_raw in (text, None)
    assert prompt.reference == text.replace(made.convert_ids_to_tokens(kept) if kept else "\0", "").strip()


EXPECTED = {
    # (family, conversation): (reference, what the data says beyond it, differences), for verl <= 0.6 and later
    ("Qwen3", "plain"): (
        ("<think>\n\n</think>\n\n14", "14", ways.TEMPLATE_ADDS),
        ("14", None),
    ),
    ("Qwen3", "thought"): (
        (THOUGHT, None),
        ("14", THOUGHT, ways.REASONING_IS_LOST),
    ),
    ("Qwen3", "two turns"): (
        (THOUGHT, None, ways.USER_TURN_IS_LOST),
        ("14", THOUGHT, ways.REASONING_IS_LOST),
    ),
    ("Qwen3", "quick"): (
        ("14", None),
        ("14", None, ways.THINK_BLOCK_IS_UNTRAINED),
    ),
    ("Qwen3", "two quick turns"): (
        ("14", None, ways.USER_TURN_IS_LOST),
        ("14", None, ways.THINK_BLOCK_IS_UNTRAINED),
    ),
    ("Qwen3.5", "thought"): (("sum\n</think>\n\n14", None), ("sum\n</think>\n\n14", None)),
    ("Qwen3.5", "quick"): (("14", None), ("14", None)),
    ("DeepSeek", "two turns"): (
        # It cuts as many characters off the answer as the generation prompt has too many: those of the last marker.
        ("d_of_sentence|>", THOUGHT, ways.REASONING_IS_LOST, ways.PROMPT_DIFFERS),
        ("14", THOUGHT, ways.REASONING_IS_LOST, ways.PROMPT_DIFFERS),
    ),
    ("GLM", "thought"): (("<think>sum</think>\n14", THOUGHT), ("<think>sum</think>\n14", THOUGHT)),
    ("GLM", "quick"): (("14", None), ("14", None)),
    ("gpt-oss", "plain"): (
        ("<|channel|>final<|message|>14", "14", ways.TEMPLATE_ADDS),
        ("<|channel|>final<|message|>14", "14", ways.TEMPLATE_ADDS),
    ),
    ("Llama 3.1", "two turns"): ((THOUGHT, None), (THOUGHT, None)),
    ("Mistral", "two turns"): ((THOUGHT, None), None),
}


@pytest.mark.parametrize(("name", "conversation"), EXPECTED)
def test_what_the_data_says_beyond_it_is_kept_and_named(tmp_path, tokenizer, name, conversation):
    expected = EXPECTED[name, conversation][BY_TURN]
    if expected is None:
        pytest.skip("verl itself cannot use this template")
    family = FAMILIES[name]
    made = tokenizer_of(family, tokenizer)
    prompt = prompts_of(dataset_of(tmp_path, made, *CONVERSATIONS[conversation]), made, family)[-1]
    assert (prompt.reference, prompt.reference_text, *prompt.differences) == expected


def test_reasoning_in_a_field_of_its_own(tmp_path, tokenizer):
    message = {"role": "assistant", "content": "14", "reasoning_content": "sum"}
    for name, text, differences in (
        ("Llama 3.1", "sum\n\n14", (ways.REASONING_IS_LOST,)),
        ("Qwen3", THOUGHT if BY_TURN else None, (ways.REASONING_IS_LOST,) if BY_TURN else ()),
    ):
        made = tokenizer_of(FAMILIES[name], tokenizer)
        dataset = dataset_of(tmp_path, made, [*talk("7+7?"), message])
        (prompt,) = prompts_of(dataset, made, FAMILIES[name])
        assert (prompt.reference_text, prompt.differences) == (text, differences)


@pytest.mark.parametrize("name", ["Qwen3", "DeepSeek"])
def test_every_turn_has_its_own_reference(tmp_path, tokenizer, name):
    """Though verl trains nothing at all of some turns of a template that opens a think block and closes none."""
    made = tokenizer_of(FAMILIES[name], tokenizer)
    dataset = dataset_of(tmp_path, made, talk("a?", "A", "b?", "123456", "c?", "C"))
    first, second, third = prompts_of(dataset, made, FAMILIES[name], turn="all")
    if name == "Qwen3":
        before = "" if BY_TURN else "<think>\n\n</think>\n\n"
        assert [p.reference for p in (first, second, third)] == [before + text for text in ("A", "123456", "C")]
    elif BY_TURN:
        assert [p.differences[0] for p in (first, third)] == [ways.NOT_TRAINED] * 2
        assert (second.reference, second.reference_text) == ("3456", "123456")


def test_a_cut_off_answer_is_the_reference_as_far_as_it_is_trained(tmp_path, tokenizer):
    made = tokenizer_of(FAMILIES["Llama 3.1"], tokenizer)
    whole = dataset_of(tmp_path, made, talk("a?", "A", "b?", "123456"))
    length = len(item_ids(whole, 0)) - 3
    for truncation, expected in (
        ("right", ("1234", "123456", ways.ANSWER_IS_CUT)),
        ("left", ("123456", None)),  # the prompt is whole: at inference nothing is cut off
    ):
        dataset = dataset_of(tmp_path, made, talk("a?", "A", "b?", "123456"), truncation=truncation, max_length=length)
        prompt = prompts_of(dataset, made, FAMILIES["Llama 3.1"])[-1]
        assert (prompt.reference, prompt.reference_text, *prompt.differences) == expected


@pytest.mark.skipif(VERL[:2] != (0, 6), reason="no other version reads a message's own loss mask")
@pytest.mark.parametrize(("masks", "reference", "differences"), [
    ((0, 0, 0, 1), "B", ()),
    ((0, 1, 0, 0), "B", (ways.NOT_TRAINED,)),
    ((1, 0, 1, 1), "B", ()),
])  # fmt: skip
def test_a_messages_own_loss_mask(tmp_path, tokenizer, masks, reference, differences):
    messages = [m | {"loss_mask": mask} for m, mask in zip(talk("a?", "A", "b?", "B"), masks, strict=True)]
    prompt = only_prompt(multi_turn(tmp_path, tokenizer, [messages]), tokenizer)
    assert (prompt.reference, prompt.differences) == (reference, differences)


def test_a_character_without_a_token_is_no_matter_of_training(tmp_path, tokenizer):
    prompt = only_prompt(multi_turn(tmp_path, tokenizer, [talk("a?", "né")]), tokenizer)
    assert (prompt.reference, prompt.reference_text, prompt.differences) == ("n<unk>", "né", ())


@needs_sft_dataset
def test_a_single_turn_is_what_its_item_has(tmp_path, tokenizer):
    dataset = single_turn(tmp_path, tokenizer, [("a?", " né "), ("b?", "12")])
    first, second = prompts_from_dataset(dataset, [0, 1], tokenizer).prompts
    assert (first.reference, first.reference_text, first.differences) == ("n<unk>", "né", ())
    assert (second.reference, second.reference_raw, second.reference_text) == ("12", "12<|im_end|>", None)


def test_an_item_that_cannot_be_read_leaves_the_text_of_the_data(tokenizer, caplog):
    """That of a data set that lacks most of what verl reads of it."""
    dataset = multi_turn_in_memory(tokenizer, talk("a?", "A"))
    with pytest.raises(Exception):  # noqa: B017, PT011
        dataset[0]
    with caplog.at_level(logging.DEBUG, "verl_valgen"):
        prompt = only_prompt(dataset, tokenizer)
    assert (prompt.reference, prompt.reference_raw, prompt.differences) == ("A", None, ())
    assert "row 0: what is trained is not known, as its item cannot be read: " in caplog.text


def test_the_data_set_is_as_before(tmp_path, tokenizer):
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A")])
    before = dict(vars(dataset))
    only_prompt(dataset, tokenizer)
    assert vars(dataset).keys() == before.keys()
    assert all(vars(dataset)[key] is before[key] for key in before)


def test_another_data_set_has_raw_references_too(tokenizer):
    ids = tokenizer("ab<|im_end|>")["input_ids"]
    (prompt,) = prompts_from_dataset(Items({"input_ids": ids, "loss_mask": [0, 1, 1]}), [0], tokenizer).prompts
    assert (prompt.reference, prompt.reference_raw, prompt.reference_text) == ("b", "b<|im_end|>", None)


def test_the_end_of_a_long_prompt_alone_is_compared():
    class Counting(list):
        copied = 0

        def __getitem__(self, place):
            found = super().__getitem__(place)
            Counting.copied += len(found) if isinstance(place, slice) else 1
            return found

    question, opened, answer = list(range(5000)), [7001, 7002], [8000] * 5000
    ids = [*question, *opened, *answer]
    for prompt, expected in (([*question, *opened], 2), (question, 0), ([*question, 9], 0), (ids[1:], 0), ([], 0)):
        Counting.copied = 0
        assert trained._overlap(Counting(prompt), ids, len(question), len(ids)) == expected
        assert Counting.copied < 5000


def test_one_warning_names_the_rows(caplog):
    def prompt(row: int, *differences: str, file: str | None = None) -> Prompt:
        return Prompt(row, [1], "", None, differences=differences, file=file)

    with caplog.at_level(logging.WARNING, "verl_valgen"):
        warn_of_differences([prompt(0), prompt(1)])
        assert caplog.text == ""
        lost = [prompt(row, ways.REASONING_IS_LOST) for row in range(12)]
        warn_of_differences([*lost, prompt(3, ways.USER_TURN_IS_LOST, ways.REASONING_IS_LOST)])
    (record,) = caplog.records
    assert record.getMessage() == (
        "validation data and training differ: the reasoning in the data is not trained (rows 0, 1, 2, 3, 4, 5, 6, 7, "
        "8, 9 and 2 more); a user turn is lost, as a whole or in part (row 3); the samples have what is trained as "
        "`reference`, and what the data says as `reference_text`"
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, "verl_valgen"):
        warn_of_differences([prompt(row, ways.NOT_TRAINED, file=file) for row, file in ((0, "a"), (1, "a"), (0, "b"))])
    assert f"{ways.NOT_TRAINED} (rows 0, 1 of a and row 0 of b)" in caplog.text
