"""How a step chooses tokens: which processors kernels serve, and the kernels by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_cases_pass
from transformers import (
    EpsilonLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from verl_valgen.backends.fast.choice import Choice, for_kernels
from verl_valgen.backends.observers import NanObserver
from verl_valgen.backends.sampling import GumbelNoise

CPU = torch.device("cpu")
NOISE = GumbelNoise(0, [(0, 0), (1, 0)], 1, 1, CPU)
OBSERVER = NanObserver(2)
TEMPERATURE, TOP_K, TOP_P, MIN_P = (
    TemperatureLogitsWarper(0.5), TopKLogitsWarper(50), TopPLogitsWarper(0.7), MinPLogitsWarper(0.1),
)  # fmt: skip


class OfAnotherKind(TopPLogitsWarper):
    """A class that kernels do not know."""


@pytest.mark.any_verl
def test_kernels_choose_what_transformers_does():
    assert_cases_pass("choice_cases.py")


def names(value: object) -> str:
    """The same in all processes, unlike the addresses of objects."""
    return "-".join(type(part).__name__ for part in value) if isinstance(value, list) else "-".join(map(str, value))


@pytest.mark.parametrize(
    ("processors", "fields"),
    [
        ([OBSERVER], {"has_noise": False}),
        ([NOISE, OBSERVER], {"has_noise": True}),
        ([OBSERVER, TEMPERATURE, NOISE], {"has_noise": True, "temperature": 0.5}),
        (
            [TEMPERATURE, TOP_K, TOP_P, MIN_P, NOISE, OBSERVER],
            {"has_noise": True, "temperature": 0.5, "top_k": 50, "top_p": 0.7, "min_p": 0.1},
        ),
    ],
    ids=names,
)
def test_processors_that_kernels_serve(processors, fields):
    assert for_kernels(LogitsProcessorList(processors)) == fields


@pytest.mark.parametrize(
    "processors",
    [
        [NOISE],  # and nobody looks for NaN
        [TOP_P, TEMPERATURE, NOISE, OBSERVER],
        [NOISE, TOP_P, OBSERVER],
        [TEMPERATURE, TEMPERATURE, NOISE, OBSERVER],
        [OfAnotherKind(0.7), NOISE, OBSERVER],
        [TopPLogitsWarper(0.7, min_tokens_to_keep=2), OBSERVER],
        [TopPLogitsWarper(1.0), OBSERVER],
        [TopKLogitsWarper(5, filter_value=-1e9), OBSERVER],
        [TypicalLogitsWarper(0.9), OBSERVER],
        [EpsilonLogitsWarper(0.01), NOISE, OBSERVER],
        [InfNanRemoveLogitsProcessor(), OBSERVER],
    ],
    ids=names,
)
def test_processors_that_are_left_to_tensor_operations(processors):
    assert for_kernels(LogitsProcessorList(processors)) is None


@pytest.mark.parametrize("processors", [[], [TEMPERATURE, NOISE], [TOP_K, TOP_P, NOISE], [TOP_P, NOISE]], ids=names)
def test_logits_of_any_type_are_taken_as_their_float32_copy(processors):
    choice = Choice(LogitsProcessorList([*processors, OBSERVER]), 1_000)
    logits = torch.randn(2, 1_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    keys = torch.tensor([5, -6])
    assert torch.equal(choice(logits, keys).tokens, choice(logits.float(), keys).tokens)
