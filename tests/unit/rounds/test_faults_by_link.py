"""Each link of the proof catches its kinds of faults: the first a wrong copy, the second a wrong way through it.

Models and faults are those of benchmarks/verification.py, with wide random weights, which need no training.
"""

from __future__ import annotations

import copy
import functools
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_models import language, tiny_model
from verification import DEFAULT, GREEDY, SEED, answers, copy_of, some_requests
from verification_faults import FAULTS, Fault

from verl_valgen.backends.hf import HFBackend
from verl_valgen.records import Completion, Prompt
from verl_valgen.rounds.links import first_link, second_link, texts_to_read
from verl_valgen.rounds.reading import Reading
from verl_valgen.weights.texts import last_logits

pytestmark = pytest.mark.filterwarnings("ignore")

CPU = torch.device("cpu")
TEXTS = [text[:length] for text, length in zip(language(2, 48, seed=77), (33, 26), strict=True)]


class Reader:
    """As much of a host as the first link asks for, of one rank: its model computes in a dtype as verl's does."""

    is_logging_rank, device, largest_unit_bytes, own_tokenizer = True, CPU, 0, None

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.compute_dtype = copy.deepcopy(model), dtype
        self.model_config = model.config
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)

    def why_not_sharded(self) -> None:
        return None

    def on_device(self) -> Any:
        return nullcontext()

    @torch.no_grad()
    def read(self, texts: list[list[int]], nums_last: list[int]) -> list[torch.Tensor]:
        with torch.autocast("cpu", self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            return last_logits(self.model, self.model.forward, texts, nums_last, CPU)


@functools.cache
def wide(name: str) -> Any:
    return tiny_model(name, "wide")[0]


def cases(kinds: set[str], but: tuple[str, ...] = ()) -> list[Any]:
    return [
        pytest.param(fault, name, id=f"{fault.kind}: {fault.what}, {name}")
        for fault in FAULTS
        if fault.kind in kinds
        for name in fault.models
        if not any(word in f"{fault.what}, {name}" for word in but)
    ]


def reading_of(model: Any, faulty: Any, dtype: torch.dtype, reader_dtype: torch.dtype) -> Reading:
    return Reading(Reader(model, reader_dtype), faulty.generation_config, SEED, dtype, faulty)  # type: ignore[arg-type]


def planted(fault: Fault, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The trainer's model, and a copy with the fault."""
    model = copy.deepcopy(wide(name))
    with torch.no_grad():
        fault.prepare(model)
        faulty = copy_of(model, dtype)
        fault.plant(faulty, {})
    return model, faulty


# The first link

# A cap of 50 changes nothing where logits are small: by 1e-4, and no answer.
OF_COPIES = cases({"1", "3", "11", "12"}, but=("cap of 50",))


@pytest.mark.parametrize(("fault", "name"), OF_COPIES)
def test_the_first_link_catches_a_wrong_copy(fault, name):
    found = first_link(reading_of(*planted(fault, name, torch.float32), torch.float32, torch.float32), TEXTS)
    assert found.verified is False
    assert found.reason.startswith("the copy is not the trainer's model: at half of 32 positions")


ROUNDED = [
    case
    for case in OF_COPIES
    if case.values[1] == "qwen3" or case.id.startswith(("3: a down", "12: head's adapter (norm 1)"))
]


@pytest.mark.parametrize(("fault", "name"), ROUNDED)
def test_the_first_link_catches_what_is_larger_than_rounding_in_bfloat16(fault, name):
    found = first_link(reading_of(*planted(fault, name, torch.bfloat16), torch.bfloat16, torch.bfloat16), TEXTS)
    assert found.verified is False


@pytest.mark.parametrize("name", sorted({case.values[1] for case in OF_COPIES}))
def test_a_right_copy_passes_in_every_dtype(name):
    model = wide(name)
    for dtype, reader_dtype in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ):
        found = first_link(reading_of(model, copy_of(model, dtype), dtype, reader_dtype), TEXTS)
        assert found == (True, "")


def test_a_model_that_has_diverged_is_its_own_copy():
    model = copy.deepcopy(wide("llama"))
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    assert first_link(reading_of(model, copy_of(model, torch.float32), torch.float32, torch.float32), TEXTS).verified


def test_the_texts_are_prompt_and_reference_of_the_first_rows():
    tokenizer: Any = SimpleNamespace(encode=lambda text, add_special_tokens: [ord(c) for c in text])
    prompts = [
        Prompt(0, [1, 2], "", "ab"), Prompt(1, [3], "", None), Prompt(2, [4], "", "c"),
        Prompt(3, [5], "", "x", reference_raw="x!"),
    ]  # fmt: skip
    assert texts_to_read([prompts[0], prompts[0], *prompts[1:]], tokenizer) == [[1, 2, 97, 98], [3]]
    assert texts_to_read(prompts[3:], tokenizer) == [[5, 120, 33]]
    assert texts_to_read(prompts, None) == [[1, 2], [3]]  # type: ignore[arg-type]


# The second link

# In recurrent states of the others padding changes no answer of these weights.
OF_WAYS = cases({"8", "9", "10"}, but=("falcon_h1", "lfm2", "qwen3_next"))


def asked(faulty: Any, params: dict[str, Any], around: Any) -> tuple[Any, Any]:
    """Eight requests, and what transformers' loop says to them in one padded batch."""
    requests = some_requests(8, params, 24, seed=1)
    longest = max(len(request.input_ids) for request in requests)
    with torch.no_grad(), around:
        found = answers(faulty, requests)
    return requests, [
        Completion(ids, "length", num_padding=longest - len(request.input_ids))
        for request, ids in zip(requests, found, strict=True)
    ]


def of_thread(function: Any, *args: Any) -> Any:
    """What a function returns in a thread of its own, where gradients are recorded unless it says otherwise."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    thread.join()
    return results[0]


def alone(faulty: Any) -> Reading:
    """For the second link, which may ask the trainer for nothing but its tokenizer."""
    host: Any = SimpleNamespace(own_tokenizer=None)
    return Reading(host, faulty.generation_config, SEED, torch.float32, faulty)


@pytest.mark.parametrize(("fault", "name"), OF_WAYS)
def test_the_second_link_catches_a_wrong_way_through_a_right_copy(fault, name):
    if fault.kind == "10" and Version(transformers.__version__) < Version("5"):
        pytest.skip("the benchmark's tables are as transformers 5 has them")
    _, faulty = planted(fault, name, torch.float32)
    found = [
        of_thread(second_link, alone(faulty), *asked(faulty, params, fault.around(faulty)))
        for params in (GREEDY, DEFAULT)
    ]
    assert all(one.verified is not None for one in found), found
    assert any(one.verified is False for one in found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_right_answers_pass_the_second_link(name):
    right = copy_of(wide(name), torch.float32)
    state = torch.get_rng_state()
    for params in (GREEDY, DEFAULT, GREEDY | {"repetition_penalty": 1.3}, GREEDY | {"num_beams": 3}):
        requests = some_requests(4, params, 12, seed=1)
        with torch.no_grad():
            completions = HFBackend(right, None, SEED).generate(requests)  # type: ignore[arg-type]
        assert of_thread(second_link, alone(right), requests, completions) == (True, "")
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_second_link_cannot_judge_it_leaves_open():
    right = copy_of(wide("llama"), torch.float32)
    requests, completions = asked(right, GREEDY, nullcontext())
    assert second_link(alone(right), [], []) == (None, "no answer that could be read")
    right.forward = None
    assert second_link(alone(right), requests, completions).verified is None
