"""By which a resumed run knows that it asks other prompts."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import datetime

import pytest
from unit.prompts.data import multi_turn, needs_sft_dataset, single_turn, talk

from verl_valgen.prompts.datasets import prompts_from_dataset
from verl_valgen.prompts.files import OwnPrompt, tokenized
from verl_valgen.records import Prompt, RowData
from verl_valgen.rounds.fingerprint import fingerprint

ONE = Prompt(3, [1, 2], "a", "b", RowData(ground_truth={"x": 1}))
TWO = Prompt(4, [1, 3], "a", "b")


def test_order_and_rows_do_not_matter():
    assert fingerprint([ONE, TWO]) == fingerprint([TWO, replace(ONE, row=9, stream=9)])


def test_what_is_asked_and_expected_matters():
    others = [
        *([ONE], [ONE, ONE], [TWO], [], [replace(ONE, input_ids=[1, 2, 3])], [replace(ONE, reference=None)]),
        [replace(ONE, data=RowData(ground_truth={"x": 2}))],
    ]
    assert len({fingerprint(prompts) for prompts in others}) == len(others)


def _from_files(tmp_path, tokenizer):
    return tokenized([OwnPrompt(talk("a?"), "A", {}, RowData())], tokenizer, {}, "last")


def _from_conversations(tmp_path, tokenizer):
    return prompts_from_dataset(multi_turn(tmp_path, tokenizer, [talk("a?", "A")]), [0], tokenizer).prompts


def _from_pairs(tmp_path, tokenizer):
    return prompts_from_dataset(single_turn(tmp_path, tokenizer), [0, 1], tokenizer).prompts


@pytest.mark.parametrize("read", [_from_files, _from_conversations, pytest.param(_from_pairs, marks=needs_sft_dataset)])
def test_the_day_does_not_matter(tmp_path, tokenizer, monkeypatch, read):
    tokenizer = copy.deepcopy(tokenizer)
    dated = "{{ strftime_now('%d') }}" + tokenizer.chat_template
    days = []
    for day, template in ((1, dated), (2, dated), (2, dated + " ")):

        class Clock(datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2026, 1, day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        tokenizer.chat_template = template
        days.append(read(tmp_path, tokenizer))
    first, second, other = days
    assert [prompt.input_ids for prompt in first] != [prompt.input_ids for prompt in second]
    assert fingerprint(first) == fingerprint(second) != fingerprint(other)


def test_what_a_template_is_given_matters(tokenizer):
    def asked(text, **kwargs):
        return fingerprint(tokenized([OwnPrompt(talk(text), "A", kwargs, RowData())], tokenizer, {}, "last"))

    assert len({asked("a?"), asked("b?"), asked("a?", enable_thinking=True)}) == 3
