"""What a chat template shows of itself: the end of a turn, and the end of reasoning."""

from __future__ import annotations

import copy

import pytest
from unit.prompts.templates import FAMILIES, tokenizer_of

from verl_valgen.prompts.conversations import ChatTemplate
from verl_valgen.prompts.reasoning import reasoning_end
from verl_valgen.prompts.turn_end import TurnEnd, end_of_turn

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}END{% endfor %}"


def with_template(tokenizer, template):
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return ChatTemplate(made, {})


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_a_turn_and_of_reasoning(tokenizer, name):
    family = FAMILIES[name]
    template = ChatTemplate(tokenizer_of(family, tokenizer), {})
    end = end_of_turn(template)
    expected = None if family.end is None else template.tokenizer.convert_tokens_to_ids(family.end)
    assert (end.text, end.token_id) == (family.end or "", expected)
    assert reasoning_end(template) == family.reasoning_end


@pytest.mark.parametrize("end", ["", "\n", " "])
def test_a_template_may_render_nothing_behind_a_turn(tokenizer, end):
    assert end_of_turn(with_template(tokenizer, TURNS.replace("END", end))) == TurnEnd("")


@pytest.mark.parametrize("end", ["### End", ";", "<|im_end|><|im_start|>"])
def test_an_end_that_is_no_token_of_its_own(tokenizer, end):
    """A mark that is a token occurs in answers, too."""
    made = end_of_turn(with_template(tokenizer, TURNS.replace("END", end + "\n")))
    assert made == TurnEnd(end, tuple(tokenizer(end)["input_ids"]), None)


def test_an_end_that_was_added_as_ordinary_text(tokenizer):
    template = with_template(tokenizer, TURNS.replace("END", "<end>"))
    template.tokenizer.add_tokens(["<end>"])
    assert end_of_turn(template).token_id == template.tokenizer.convert_tokens_to_ids("<end>") is not None


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{% for m in messages %}x{% endfor %}"]
)
def test_a_template_that_shows_nothing_costs_nothing(tokenizer, template):
    made = with_template(tokenizer, template)
    assert (end_of_turn(made), reasoning_end(made)) == (TurnEnd(""), "")


def test_the_end_of_reasoning_is_what_the_template_sets_between(tokenizer):
    template = "{% for m in messages %}{{ m.role }}{{ m.reasoning_content }} ~~ {{ m.content }}{% endfor %}"
    assert reasoning_end(with_template(tokenizer, template)) == "~~"


def test_a_processor_that_takes_parts_alone(tokenizer, processor):
    assert end_of_turn(ChatTemplate(tokenizer, {}, processor)).text == "|<|im_end|>"
