"""Which two answers of a round are read."""

from __future__ import annotations

from transformers import LlamaConfig

from verl_valgen.records import Completion, Request
from verl_valgen.rounds.reading import chosen_excerpts

REQUESTS = [Request([5] * length, (row, 0), {"do_sample": False}) for row, length in enumerate((3, 4, 5, 30))]


def read(*answers: Completion) -> list[int]:
    return [index for index, *_ in chosen_excerpts(REQUESTS, answers, LlamaConfig())]


def test_an_answer_in_a_place_that_others_had_before_it_and_the_longest():
    answers = [Completion([7] * 4, "length", num_before=before, num_padding=9 - before) for before in (0, 0, 2, 0)]
    assert read(*answers) == [2, 3]


def test_of_those_the_one_beside_the_most_padding():
    paddings = ((1, 0), (1, 6), (0, 30), (0, 0))
    answers = [Completion([7] * 4, "length", num_before=before, num_padding=padding) for before, padding in paddings]
    assert read(*answers) == [1, 3]


def test_without_others_the_two_longest():
    assert read(*[Completion([7] * number, "length") for number in (9, 1, 2, 3)]) == [0, 3]
