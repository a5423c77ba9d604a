"""Answers that were drawn by another's noise are judged by the probabilities that came with them."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from verl_valgen.backends import judging
from verl_valgen.backends.judging import EXACT, ROUNDED, ROUTED, logprob_gaps, objection
from verl_valgen.backends.sampling import logits_warpers
from verl_valgen.records import Request

VOCAB_SIZE, NUM_TOKENS = 200, 64
PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
SAMPLED = [
    {},
    {"temperature": 0.3, "top_k": 50, "top_p": 0.7},
    {"temperature": 1.5, "top_p": 0.95},
    {"top_k": 3},
    {"top_k": 1},
    {"min_p": 0.1},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
]
NARROW = {"top_k": 20, "top_p": 0.8}
NOTHING = LogitsProcessorList()


def logits_of(number: int, spread: float = 3.0) -> torch.Tensor:
    """(T, V) float32."""
    return torch.randn(NUM_TOKENS, VOCAB_SIZE, generator=torch.Generator().manual_seed(number)) * spread


def request_of(**params: object) -> Request:
    return Request([5, 6, 7], (3, 1), PLAIN | params)


def drawn(logits: torch.Tensor, request: Request, processors: LogitsProcessorList = NOTHING) -> list[int]:
    """What an engine draws that gets these logits, by noise of its own."""
    generator, output_ids = torch.Generator().manual_seed(5), []
    warpers = logits_warpers(request.params, logits.device)
    for row in logits:
        ids = torch.tensor([[*request.input_ids, *output_ids]])
        probabilities = warpers(ids, processors(ids, row[None].clone())).softmax(-1)
        output_ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return output_ids


def given(logits: torch.Tensor, output_ids: list[int]) -> list[float]:
    """The log-probabilities that it gives them, before any processor."""
    return logits.log_softmax(-1)[torch.arange(len(output_ids)), output_ids].tolist()


def judge(logits: torch.Tensor, request: Request, output_ids: list[int], own: list[float]) -> torch.Tensor:
    return logprob_gaps(logits, request, output_ids, own)


@pytest.mark.parametrize("params", SAMPLED, ids=str)
def test_the_models_own_log_probabilities_pass_and_those_of_another_do_not(params):
    request, logits, others = request_of(**params), logits_of(1), logits_of(2)
    right, wrong = drawn(logits, request), drawn(others, request)
    found = judge(logits, request, right, given(logits, right))
    assert found.shape == (NUM_TOKENS,)
    assert found.dtype == torch.float32
    assert found.max() < 1e-5
    of_another = judge(logits, request, wrong, given(others, wrong))
    assert of_another.isfinite().all()
    assert objection(of_another, ROUTED)


@pytest.mark.parametrize("params", SAMPLED, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_logits_that_are_rounded_to_16_bits_pass_where_that_is_expected(params, spread):
    request = request_of(**params)
    for number in range(5):
        logits = logits_of(number, spread)
        rounded = (logits + 0.01 * spread * logits_of(100 + number, 1.0)).bfloat16()
        output_ids = drawn(rounded.float(), request)
        own = given(rounded.float(), output_ids)
        assert objection(judge(logits, request, output_ids, own), ROUNDED) is None
        assert objection(judge(rounded, request, output_ids, own), EXACT) is None  # the reader's may be of any dtype


def test_right_tokens_with_the_log_probabilities_of_other_weights_are_objected_to():
    """As if the answers of this round came with last round's weights: a little off, everywhere."""
    request, logits = request_of(), logits_of(1)
    before = logits + 0.3 * logits_of(3, 1.0)
    output_ids = drawn(before, request)
    found = judge(logits, request, output_ids, given(before, output_ids))
    assert objection(found, EXACT)
    assert objection(judge(logits, request, output_ids, [0.0] * NUM_TOKENS), ROUTED)


@pytest.mark.parametrize("params", [{"top_k": 20}, {"top_p": 0.5}, {"min_p": 0.3}, NARROW], ids=str)
def test_tokens_outside_of_what_the_warpers_leave_are_objected_to_whatever_their_log_probabilities(params):
    """As if a parameter had been left out."""
    request, logits = request_of(**params), logits_of(1)
    free = drawn(logits, request_of(temperature=3.0))
    own = given(logits, free)
    assert objection(judge(logits, request_of(), free, own), EXACT) is None
    assert objection(judge(logits, request, free, own), ROUNDED)


def test_a_token_just_outside_of_top_k_lacks_the_distance_to_the_last_inside():
    logits = torch.linspace(0, 9.95, VOCAB_SIZE)[None]  # the last is the largest; 0.05 lie between neighbours
    request = request_of(top_k=50)
    for token, missing in ((199, 0.0), (150, 0.0), (149, 0.05), (140, 0.5)):
        found = judge(logits, request, [token], given(logits, [token])).item() * logits.std().item()
        assert found == pytest.approx(missing, abs=1e-4)


@pytest.mark.parametrize(("probability", "is_outside"), [(0.69, False), (0.71, False), (0.8, True)])
def test_a_token_at_the_edge_of_top_p_may_be_chosen(probability, is_outside):
    logits = torch.full((1, VOCAB_SIZE), -30.0)
    logits[0, 0], logits[0, 1] = math.log(probability), math.log(1 - probability)
    request = request_of(top_p=0.7)
    found = judge(logits, request, [1], given(logits, [1])).item()
    assert (found > 0.01) == is_outside


def test_a_log_probability_counts_in_units_of_the_spread():
    logits = logits_of(4)
    output_ids = drawn(logits, request_of())
    own = [logprob + 0.6 for logprob in given(logits, output_ids)]
    found = judge(logits, request_of(), output_ids, own)
    torch.testing.assert_close(found, 0.6 / logits.std(-1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(judge(logits + 1000, request_of(), output_ids, own), found, rtol=1e-2, atol=1e-3)


PENALTY = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])


def test_a_repetition_penalty_changes_what_is_inside_and_that_is_no_objection():
    """The log-probabilities are those before it; which tokens the warpers leave nobody can tell by them."""
    logits = logits_of(6, spread=1.5).sort(-1).values  # the same few tokens would be drawn again and again
    output_ids = drawn(logits, request_of(**NARROW), PENALTY)
    own = given(logits, output_ids)
    assert objection(judge(logits, request_of(**NARROW), output_ids, own), ROUNDED), "nothing was penalised"
    for changes in ({"repetition_penalty": 3.0}, {"bad_words_ids": [[1]]}, {"min_new_tokens": 9}):
        assert judge(logits, request_of(**NARROW, **changes), output_ids, own).max() < 1e-5
        of_another = given(logits_of(7), output_ids)
        assert objection(judge(logits, request_of(**NARROW, **changes), output_ids, of_another), ROUTED)


@pytest.mark.parametrize("params", [{}, NARROW], ids=str)
def test_long_answers_in_parts_are_judged_as_whole_ones(params, monkeypatch):
    request, logits, others = request_of(**params), logits_of(8), logits_of(9)
    output_ids = drawn(others, request)
    whole = judge(logits, request, output_ids, given(others, output_ids))
    assert whole.max() > 0.5
    monkeypatch.setattr(judging, "_CHUNK_NUMBERS", 5 * VOCAB_SIZE)
    parts = judge(logits, request, output_ids, given(others, output_ids))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_has_no_numbers_is_an_objection(broken):
    logits = logits_of(1)
    output_ids = drawn(logits, request_of())
    without_logits = judge(torch.full_like(logits, broken), request_of(), output_ids, given(logits, output_ids))
    without_logprobs = judge(logits, request_of(), output_ids, [broken] * NUM_TOKENS)
    for found in (without_logits, without_logprobs):
        assert found.isfinite().all()
        assert objection(found, ROUTED)


def test_nothing_is_random_and_the_logits_stay():
    logits = logits_of(8).bfloat16()
    output_ids = drawn(logits.float(), request_of(**NARROW))
    own, before, state = given(logits.float(), output_ids), logits.clone(), torch.get_rng_state()
    first, second = (judge(logits, request_of(**NARROW), output_ids, own) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(logits, before)
    assert torch.equal(torch.get_rng_state(), state)
