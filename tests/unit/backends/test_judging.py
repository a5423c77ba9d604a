"""Answers are judged by how far the reader's logits are from choosing them, whatever chose them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from verl_valgen.backends import judging
from verl_valgen.backends.judging import EXACT, ROUNDED, ROUTED, objection, shortfalls, tolerance
from verl_valgen.backends.sampling import logits_warpers, perturbed, stream_keys
from verl_valgen.records import Request

SEED, VOCAB_SIZE, NUM_TOKENS = 11, 200, 64
PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
NOTHING = LogitsProcessorList()


def logits_of(number: int, spread: float = 3.0, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    """(T, V) float32."""
    return torch.randn(num_tokens, VOCAB_SIZE, generator=torch.Generator().manual_seed(number)) * spread


def request_of(**params) -> Request:
    return Request([5, 6, 7], (3, 1), {"do_sample": False, **params})


def answer(logits: torch.Tensor, request: Request, processors: LogitsProcessorList = NOTHING) -> list[int]:
    """What a loop would choose that gets these logits."""
    keys = stream_keys(SEED, torch.tensor(3), torch.tensor(1), torch.arange(len(logits)))
    warpers = logits_warpers(request.params, logits.device) if request.params["do_sample"] else NOTHING

    def choose(scores: torch.Tensor, keys: torch.Tensor, ids: torch.Tensor) -> list[int]:
        scores = warpers(ids, processors(ids, scores.clone()))
        return (perturbed(scores, keys) if request.params["do_sample"] else scores).argmax(-1).tolist()

    if not processors:
        return choose(logits, keys, torch.tensor([request.input_ids]))
    output_ids: list[int] = []
    for row, key in zip(logits, keys, strict=True):
        output_ids += choose(row[None], key[None], torch.tensor([request.input_ids + output_ids]))
    return output_ids


def judge(logits, request, output_ids, processors=NOTHING) -> torch.Tensor:
    return shortfalls(logits, request, output_ids, SEED, processors)


SAMPLED = [
    {"top_k": 50, "top_p": 0.7},
    {"temperature": 0.3, "top_k": 50, "top_p": 0.7},
    {"temperature": 1.5, "top_p": 0.95},
    {"min_p": 0.1},
    {"top_k": 1},
    {"top_k": 3},
    {"typical_p": 0.9},
    {"epsilon_cutoff": 0.01},
]
EVERY_WAY = [{"do_sample": False}, *(PLAIN | params for params in SAMPLED)]


@pytest.mark.parametrize("params", EVERY_WAY, ids=str)
def test_what_the_same_logits_choose_lacks_nothing_and_what_others_choose_does(params):
    request = request_of(**params)
    logits = logits_of(1)
    right, wrong = (answer(some, request) for some in (logits, logits_of(2)))
    assert judge(logits, request, right).max() == 0
    found = judge(logits, request, wrong)
    assert (found > 1).double().mean() > 0.6
    assert found.isfinite().all()
    assert objection(found, ROUTED)
    assert not objection(judge(logits, request, right), EXACT)


@pytest.mark.parametrize("params", EVERY_WAY, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_rounding_shifts_what_is_chosen_and_nothing_is_far_off(params, spread):
    request = request_of(**params)
    worst = []
    for number in range(10):
        logits = logits_of(number, spread)
        noise = 0.01 * spread * logits_of(100 + number, 1.0)
        worst.append(judge(logits, request, answer(logits + noise, request)))
    found = torch.cat(worst)
    assert (found > ROUNDED.far).double().mean() < 0.004
    assert found.max() < 3


def test_a_greedy_token_lacks_its_distance_to_the_largest_in_units_of_the_spread():
    logits = torch.zeros(1, 100)
    logits[0, 7], logits[0, 3] = 5.0, 2.0
    assert judge(logits, request_of(), [3]).item() == pytest.approx(3.0 / logits.std().item(), rel=1e-5)
    assert judge(logits * 40 + 1000, request_of(), [3]).item() == pytest.approx(3.0 / logits.std().item(), rel=1e-4)


def test_a_token_just_outside_of_top_k_lacks_the_distance_to_the_last_inside():
    logits = torch.linspace(0, 9.95, 200)[None]  # the last is the largest; 0.05 lie between neighbours
    request = request_of(**PLAIN | {"top_k": 50})
    inside_and_out = [150, 149]
    chosen = [judge(logits, request, [token]).item() * logits.std().item() for token in inside_and_out]
    assert chosen[1] >= 0.05 - 1e-4  # whatever the noise prefers
    logits[0, 150] += 30.0  # now it is first, and alone within reach of the noise
    assert judge(logits, request, [150]).item() == 0
    # A rival that the noise prefers is no objection where it is about to leave: it lacks 0.05 to be outside.
    edge = torch.full((1, VOCAB_SIZE), -20.0)
    edge[0, :2] = torch.tensor([0.0, 0.01])
    for row in range(50):
        request = dataclasses.replace(request_of(**PLAIN | {"top_k": 1}), key=(row, 0))
        assert judge(edge, request, [0]).item() == pytest.approx(0.01 / edge.std().item(), abs=1e-3)


@pytest.mark.parametrize("mass", [0.69, 0.71])
def test_a_token_at_the_edge_of_top_p_may_be_chosen(mass):
    """The first has 69 or 71 % of the mass: with a top-p of 0.7 the second is in, or out by a hair."""
    logits = torch.full((1, VOCAB_SIZE), -30.0)
    logits[0, 0], logits[0, 1] = math.log(mass), math.log(1 - mass)
    keys = stream_keys(SEED, torch.arange(200), torch.tensor(0), torch.tensor(0))
    prefers_second = perturbed(logits.expand(200, -1), keys).argmax(-1) == 1
    assert 0 < prefers_second.sum() < 200
    for row in torch.nonzero(prefers_second)[:5, 0].tolist():
        request = dataclasses.replace(request_of(**PLAIN | {"top_p": 0.7}), key=(row, 0))
        assert judge(logits, request, [1]).item() == 0
        assert judge(logits, request, [0]).item() == 0
        assert judge(logits, request, [2]).item() > 1
        surely_out = dataclasses.replace(request, params=PLAIN | {"top_p": 0.5})
        assert judge(logits, surely_out, [1]).item() > 0


def test_a_token_that_a_processor_forbids_is_far_off_by_a_number():
    logits = logits_of(4)
    request = request_of()
    suppress = LogitsProcessorList([SuppressTokensLogitsProcessor([int(logits[0].argmax())], device="cpu")])
    free, bound = answer(logits, request), answer(logits, request, suppress)
    assert free != bound
    assert judge(logits, request, bound, suppress).max() == 0
    found = judge(logits, request, free, suppress)
    assert found.isfinite().all()
    assert found[0] > 100


@pytest.mark.parametrize("params", [{"do_sample": False}, PLAIN | {"top_k": 50, "top_p": 0.7}], ids=str)
def test_processors_get_the_tokens_before_and_no_others(params):
    logits = logits_of(6, spread=1.0).sort(-1).values  # the same few tokens would be chosen again and again
    request = request_of(**params)
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(4.0)])
    penalised = answer(logits, request, penalty)
    assert len(set(penalised)) > 20
    assert judge(logits, request, penalised, penalty).max() == 0
    assert objection(judge(logits, request, penalised), ROUNDED)


@pytest.mark.parametrize("params", [{"do_sample": False}, PLAIN | {"top_k": 50, "top_p": 0.7}], ids=str)
def test_long_answers_in_parts_are_judged_as_whole_ones(params, monkeypatch):
    request, logits = request_of(**params), logits_of(8)
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0)])
    output_ids = answer(logits_of(9), request)
    whole = judge(logits, request, output_ids, penalty)
    assert whole.max() > 0.5
    monkeypatch.setattr(judging, "_CHUNK_NUMBERS", 5 * VOCAB_SIZE)
    torch.testing.assert_close(judge(logits, request, output_ids, penalty), whole, rtol=0, atol=0)


@pytest.mark.parametrize("params", [{"do_sample": False}, PLAIN | {"top_k": 50, "top_p": 0.7}], ids=str)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_reader_without_numbers_is_an_objection(params, broken):
    logits = torch.full((24, VOCAB_SIZE), broken)
    found = judge(logits, request_of(**params), list(range(24)))
    assert found.isfinite().all()
    assert objection(found, ROUTED)


@pytest.mark.parametrize("params", [{"do_sample": False}, PLAIN | {"top_k": 50, "top_p": 0.7}], ids=str)
def test_nothing_is_random_and_the_logits_stay(params):
    request, logits = request_of(**params), logits_of(8).bfloat16()
    before, state = logits.clone(), torch.get_rng_state()
    first, second = (judge(logits, request, answer(logits_of(9), request)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(logits, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.float32


def test_the_tolerance_depends_on_dtypes_and_experts():
    assert tolerance((torch.float32, torch.float32), has_experts=True) == EXACT
    assert tolerance((torch.float32, torch.bfloat16), has_experts=False) == ROUNDED
    assert tolerance((torch.bfloat16, torch.float32), has_experts=False) == ROUNDED
    assert tolerance((torch.float16, torch.float16), has_experts=True) == ROUTED
    assert EXACT.far < ROUNDED.far < ROUTED.far


def most(limits: judging.Tolerance, num_tokens: int) -> int:
    """The most tokens that may be far off, by trying."""
    for count in range(num_tokens + 1):
        values = torch.zeros(num_tokens)
        values[:count] = 50.0
        if objection(values, limits):
            return count - 1
    return num_tokens


@pytest.mark.parametrize("limits", [EXACT, ROUNDED, ROUTED])
def test_the_rule_counts_tokens_and_grows_with_the_answer(limits):
    assert objection(torch.full((500,), limits.far), limits) is None  # not beyond it
    assert objection(torch.zeros(0), limits) is None
    assert objection(torch.tensor([9e3]), limits) is None  # one token alone proves nothing
    for num_tokens in (1, 2, 3, 24, 100, 2000):
        allowed = limits.num_tokens + limits.share * num_tokens
        assert most(limits, num_tokens) == min(int(allowed + 1e-6), num_tokens)


def test_the_objection_has_the_numbers():
    values = torch.zeros(24)
    values[:12] = torch.linspace(0.5, 3.25, 12)
    expected = "12 of 24 tokens lie below what the trainer's model would choose, by up to 3.2 times the spread of its"
    found = objection(values, ROUNDED)
    assert found is not None
    assert found.startswith(expected)
    assert objection(values.flip(0), ROUNDED) == found


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e4])
def test_tokens_that_a_model_rules_out_do_not_widen_the_spread(low):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    request = Request([1, 2], (0, 0), {"do_sample": False, "max_new_tokens": 6})
    right = logits.argmax(-1).tolist()
    wrong = logits.argsort(-1)[:, 20].tolist()
    ruled_out = torch.cat([logits, torch.full((6, 5), low)], dim=-1)
    for output_ids in (right, wrong):
        expected = shortfalls(logits, request, output_ids, 0, LogitsProcessorList())
        found = shortfalls(ruled_out, request, output_ids, 0, LogitsProcessorList())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
