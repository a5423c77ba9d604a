"""The counter-based noise is Philox, its draws follow the softmax, and they depend on their key alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from verl_valgen.backends.sampling import (
    WARPERS,
    GumbelNoise,
    gumbel_noise,
    logits_warpers,
    perturbed,
    philox_4x32,
    split_mix_64,
    stream_keys,
)
from verl_valgen.settings.generation_config import SAMPLING_ONLY

CPU = torch.device("cpu")


# The known answers of Random123's `kat_vectors` for philox4x32-10.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert [int(word) for word in philox_4x32(counter, key)] == expected


def test_split_mix_gives_the_known_answers():
    # The first outputs of java.util.SplittableRandom's generator from the seed 1234567, as Vigna's splitmix64.c prints.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    outputs = split_mix_64(torch.tensor(1234567), torch.arange(5))
    assert [int(word) % 2**64 for word in outputs] == known


def noise_for(seed: int, rows: torch.Tensor, completions: torch.Tensor, position: torch.Tensor | int, vocab_size: int):
    """(B, V) float32."""
    keys = stream_keys(seed, rows, completions, torch.as_tensor(position))
    return gumbel_noise(keys[:, None], torch.arange(vocab_size))


def draws(logits: torch.Tensor, num_draws: int, seed: int = 0) -> torch.Tensor:
    """Token counts over `num_draws` rows, (V,)."""
    rows = torch.arange(num_draws)
    noise = noise_for(seed, rows, torch.zeros_like(rows), 0, logits.numel())
    return torch.bincount((logits + noise).argmax(-1), minlength=logits.numel())


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -3.0, 1.5])
    num_draws = 40_000
    expected = torch.softmax(logits.double(), -1) * num_draws
    for seed in (0, 1, 12345678901234567890):
        chi_square = ((draws(logits, num_draws, seed) - expected) ** 2 / expected).sum()
        assert chi_square < 22.5  # 0.1 % of correct samplers exceed it, with 6 degrees of freedom


@pytest.mark.parametrize("varied", ["row", "completion", "position"])
def test_draws_along_every_part_of_the_key_follow_the_softmax(varied):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    num_draws = 40_000
    parts = {name: torch.zeros(num_draws, dtype=torch.int64) for name in ("row", "completion", "position")}
    parts[varied] = torch.arange(num_draws)
    noise = noise_for(3, parts["row"], parts["completion"], parts["position"], 4)
    counts = torch.bincount((logits + noise).argmax(-1), minlength=4)
    expected = torch.softmax(logits.double(), -1) * num_draws
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 0.1 %, 3 degrees of freedom


def test_noise_is_finite_and_standard_gumbel():
    noise = noise_for(0, torch.arange(64), torch.zeros(64, dtype=torch.int64), 5, 8192).double()
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert noise.var().item() == pytest.approx(1.6449, abs=0.02)  # pi^2 / 6


@given(
    seed=st.integers(0, 2**64 - 1),
    row=st.integers(0, 2**32 - 1),
    completion=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**20),
    vocab_size=st.integers(1, 70),
    neighbours=st.lists(st.integers(0, 2**32 - 1), max_size=4),
)
@settings(deadline=None, max_examples=50)
def test_noise_depends_on_its_key_alone(seed, row, completion, position, vocab_size, neighbours):
    def noise_of(rows, at):
        return noise_for(seed, torch.tensor(rows), torch.full((len(rows),), completion), position, vocab_size)[at]

    alone = noise_of([row], 0)
    assert torch.equal(alone, noise_of([*neighbours, row], len(neighbours)))
    wider = noise_for(seed, torch.tensor([row]), torch.tensor([completion]), position, vocab_size + 9)[0]
    assert torch.equal(alone, wider[:vocab_size])


def test_noise_is_finite_at_both_ends():
    """The least and the largest 52 bits that there can be, at the end of the same arithmetic."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verl_valgen.backends.sampling.split_mix_64", lambda keys, index: torch.tensor([0, -1]))
        low, high = gumbel_noise(torch.zeros(1), torch.zeros(1)).tolist()
    assert -4 < low < high < 37


def test_noise_on_the_tokens_that_can_be_drawn_is_the_noise_on_all():
    scores = torch.linspace(-3, 3, 40).reshape(2, 20)
    keys = stream_keys(7, torch.tensor([3, 4]), torch.tensor([0, 1]), torch.tensor(2))
    everywhere = scores + gumbel_noise(keys[:, None], torch.arange(20))
    assert torch.equal(perturbed(scores, keys), everywhere)
    masked = scores.masked_fill(scores < 0.3, -torch.inf)
    assert torch.equal(perturbed(masked, keys), everywhere.masked_fill(scores < 0.3, -torch.inf))


@pytest.mark.parametrize(("params", "allowed"), [({"top_k": 3}, 3), ({"top_p": 0.7}, 2), ({"min_p": 0.5}, 2)])
def test_draws_never_leave_the_set_of_the_warper(params, allowed):
    logits = torch.tensor([3.0, 2.5, 1.0, 0.0, -1.0, -2.0])
    warped = logits_warpers(params, CPU)(None, logits[None])[0]
    counts = draws(warped, 5_000)
    assert (counts[:allowed] > 0).all()
    assert (counts[allowed:] == 0).all()


def test_warpers_are_those_of_transformers_in_its_order():
    params = {
        "eta_cutoff": 1e-3, "min_p": 0.1, "top_p": 0.9, "temperature": 0.5, "top_k": 7, "typical_p": 0.8,
        "epsilon_cutoff": 1e-3, "do_sample": True,
    }  # fmt: skip
    names = [type(warper).__name__.removesuffix("LogitsWarper") for warper in logits_warpers(params, CPU)]
    assert names == ["Temperature", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta"]
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "min_p": None}
    assert logits_warpers(neutral, CPU) == []


def test_the_position_is_counted_from_the_end_of_the_prompt():
    scores = torch.zeros(1, 5)
    short = GumbelNoise(0, [(4, 0)], prompt_length=2, max_new_tokens=3, device=CPU)
    long = GumbelNoise(0, [(4, 0)], prompt_length=9, max_new_tokens=3, device=CPU)
    assert torch.equal(short(torch.zeros(1, 3), scores), long(torch.zeros(1, 10), scores))
    assert not torch.equal(short(torch.zeros(1, 3), scores), short(torch.zeros(1, 4), scores))


def test_no_global_random_state_is_used():
    before = torch.get_rng_state()
    processors = LogitsProcessorList([*logits_warpers({"top_k": 3}, CPU), GumbelNoise(0, [(0, 0)], 1, 4, CPU)])
    processors(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 8))
    assert torch.equal(before, torch.get_rng_state())


def test_configuration_and_sampling_agree_on_the_sampling_fields():
    assert {name for name, *_ in WARPERS} == SAMPLING_ONLY
