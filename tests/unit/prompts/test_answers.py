"""What is shown of an answer and of its reference."""

from __future__ import annotations

import pytest
from unit.prompts.data import multi_turn, talk
from unit.prompts.templates import FAMILIES, tokenizer_of

from verl_valgen.prompts.answers import AnswerReader, AnswerTexts, ReferenceTexts
from verl_valgen.prompts.datasets import prompts_from_dataset
from verl_valgen.prompts.tokens import Decoder
from verl_valgen.records import Completion, Prompt, RowData

END = "</think>"


def prompt_of(tokenizer, text="a?", **fields):
    return Prompt(fields.pop("row", 0), tokenizer(text)["input_ids"], text, fields.pop("reference", None), **fields)


def said(reader, tokenizer, text, prompt="a?", reason="eos"):
    completion = Completion(tokenizer(text)["input_ids"], reason)
    return reader.answer(tokenizer(prompt)["input_ids"], completion)


def test_an_answer_is_without_its_end_and_the_raw_one_with_it(tokenizer):
    reader = AnswerReader(Decoder(tokenizer))
    assert said(reader, tokenizer, "007<|im_end|>") == AnswerTexts("007", "007<|im_end|>", None)
    assert said(reader, tokenizer, "007", reason="length") == AnswerTexts("007", None, None)
    assert said(reader, tokenizer, "<|im_start|>x<|im_end|>").generation == "<|im_start|>x"


def test_an_ordinary_token_that_is_called_the_end_is_left_out_at_the_end_alone(tokenizer):
    reader = AnswerReader(Decoder(tokenizer))
    assert said(reader, tokenizer, "a;b;") == AnswerTexts("a;b", "a;b;", None)
    assert said(reader, tokenizer, "a;b;", reason="stop") == AnswerTexts("a;b;", None, None)


@pytest.mark.parametrize(
    ("text", "generation"),
    [
        (f"<think>x</think>\n\n14{END}\n15", "15"),
        ("<think>x</think>\n\n14 \n", "14 \n"),
        ("<think>x", ""),
        ("14", ""),
        (f"x{END}", ""),
    ],
)
def test_without_reasoning_an_answer_is_what_follows_its_last_end(tokenizer, text, generation):
    reader = AnswerReader(Decoder(tokenizer), END)
    assert said(reader, tokenizer, text + "<|im_end|>") == AnswerTexts(generation, text + "<|im_end|>", text)
    assert said(AnswerReader(Decoder(tokenizer)), tokenizer, text + "<|im_end|>").generation == text


def test_where_the_prompt_has_closed_the_reasoning_the_answer_is_whole(tokenizer):
    reader = AnswerReader(Decoder(tokenizer), END)
    closed = "a?<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert said(reader, tokenizer, "14", closed, "length") == AnswerTexts("14", None, None)
    assert said(reader, tokenizer, f"<think>x{END}14", closed).generation == "14"[:-1]  # the end is left out
    assert said(reader, tokenizer, "14", f"What is {END}?", "length").generation == ""


def test_a_reference_without_the_end_of_a_reasoning_is_whole(tokenizer):
    reader = AnswerReader(Decoder(tokenizer), END)
    with_reasoning = prompt_of(tokenizer, reference="<think>x</think>\n\n14", reference_raw="<think>x</think>\n\n14|")
    assert reader.reference(with_reasoning) == ReferenceTexts("14", "<think>x</think>\n\n14|")
    assert reader.reference(prompt_of(tokenizer, reference="<think>x</think>\n14")) == ("14", "<think>x</think>\n14")
    assert reader.reference(prompt_of(tokenizer, reference="14")) == ReferenceTexts("14", None)
    assert reader.reference(prompt_of(tokenizer)) == ReferenceTexts(None, None)


@pytest.mark.parametrize(("truth", "text"), [("007", "007"), (7, "7"), (["a", "ü"], '["a", "ü"]'), (None, None)])
def test_the_ground_truth_in_place_of_what_is_trained(tokenizer, truth, text):
    reader = AnswerReader(Decoder(tokenizer), wants_ground_truth=True)
    prompt = prompt_of(tokenizer, reference="so 7", reference_raw="so 7<|im_end|>", data=RowData(ground_truth=truth))
    assert reader.reference(prompt) == ReferenceTexts(text, "so 7<|im_end|>")


def test_what_an_own_prompt_expects_stands_without_a_ground_truth(tokenizer):
    reader = AnswerReader(Decoder(tokenizer), wants_ground_truth=True)
    assert reader.reference(prompt_of(tokenizer, row=None, reference="4")).reference == "4"
    own = prompt_of(tokenizer, row=None, reference="4", data=RowData(ground_truth="5"))
    assert reader.reference(own).reference == "5"


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3.5", "GLM", "gpt-oss"])
def test_of_a_trained_turn_with_reasoning_the_answer_is_left(tmp_path, tokenizer, name):
    """An answer that says what is trained is the reference, with reasoning and without."""
    family = FAMILIES[name]
    made = tokenizer_of(family, tokenizer)
    ends = made.convert_tokens_to_ids([family.end] if family.end else [])
    turn = {"role": "assistant", "content": "14", "reasoning_content": "7 twice", "thinking": "7 twice"}
    dataset = multi_turn(tmp_path, made, [[*talk("7+7?"), turn]], ignore_input_ids_mismatch=True)
    (prompt,) = prompts_from_dataset(dataset, [0], made, end_ids=ends).prompts
    raw = prompt.reference_raw or prompt.reference
    for end, reference in (("", prompt.reference), (family.reasoning_end, "14")):
        reader = AnswerReader(Decoder(made, ends), end)
        shown = reader.answer(prompt.input_ids, Completion(made(raw.rstrip())["input_ids"], "stop"))
        if family.reasoning_end in raw or not end:  # verl 0.9 does not train Qwen3's reasoning
            assert shown.generation.strip() == reader.reference(prompt).reference == reference
