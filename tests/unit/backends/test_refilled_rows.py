"""Rows that are refilled, without CUDA: an answer is that of its request alone, whatever its row held before."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from row_cases import GREEDY, MIXED, PARAMETERS, SAMPLING, answer, model, requests, tokenizer

from verl_valgen.backends import hf
from verl_valgen.backends.base import Limits, UnsuitableError
from verl_valgen.backends.fast import backend as fast_backend
from verl_valgen.backends.fast import loop
from verl_valgen.backends.fast.backend import FastBackend
from verl_valgen.backends.fast.cache import RowCache
from verl_valgen.backends.fast.loop import CHECK_EVERY_ON_CPU, DecodingLoop
from verl_valgen.backends.fast.step import NOTHING, Decoder, Method
from verl_valgen.backends.hf import HFBackend
from verl_valgen.backends.lengths import MOST_PROMPT_TOKENS
from verl_valgen.records import Request

__all__ = ["model", "tokenizer"]


@pytest.mark.parametrize("params", PARAMETERS.values(), ids=PARAMETERS)
def test_an_answer_is_that_of_its_request_alone(model, tokenizer, params):
    asked = requests(*MIXED)
    expected = answer(HFBackend, model, tokenizer, asked, params, batch_size=1)
    assert params is GREEDY or len({len(one.output_ids) for one in expected}) > 4
    refilled = answer(FastBackend, model, tokenizer, asked, params)
    assert refilled == expected
    assert sum(one.num_before > 0 for one in refilled) >= len(MIXED) - 3
    assert [answer(FastBackend, model, tokenizer, [one], params)[0] for one in asked] == expected
    assert answer(FastBackend, model, tokenizer, asked[::-1], params) == expected[::-1]


def test_every_request_has_a_limit_of_its_own(model, tokenizer):
    """The context ends at another place in each answer, and nothing is kept apart for it."""
    asked = requests(120, 5, 127, 110, 128, 100, 124, eos_token_id=89, do_sample=False, max_new_tokens=20)
    expected = answer(HFBackend, model, tokenizer, asked)
    assert [len(one.output_ids) for one in expected] == [8, 20, 1, 18, 0, 20, 4]
    assert answer(FastBackend, model, tokenizer, asked) == expected


class Passes:
    """Counts forward passes of a model, and the prompts that they read."""

    def __init__(self, model: Any) -> None:
        self.prompts: list[list[int]] = []
        self.num_steps = 0
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1:
            self.prompts += ids.tolist()
        else:
            self.num_steps += 1


def test_completions_and_strategies_share_the_reading_of_a_prompt(model, tokenizer):
    prompts = requests(9, 14, 6, 20)
    asked = [
        replace(one, key=(one.key[0], completion), params=params)
        for params, completion, one in itertools.product((SAMPLING, GREEDY, PARAMETERS["nucleus"]), range(3), prompts)
    ]
    expected = answer(HFBackend, model, tokenizer, asked, batch_size=1)
    answer(FastBackend, model, tokenizer, asked[:1])  # what is tried is tried
    passes = Passes(model)
    assert answer(FastBackend, model, tokenizer, asked, batch_size=12) == expected
    assert len(passes.prompts) == 4
    passes.prompts.clear()
    assert answer(FastBackend, model, tokenizer, asked, batch_size=5) == expected
    assert len(passes.prompts) < 3 * 4


def test_rows_are_not_idle_while_requests_wait(model, tokenizer):
    """Nothing waits for the longest of a batch."""
    asked = requests(*MIXED * 3)
    answer(FastBackend, model, tokenizer, asked[:1], SAMPLING)
    passes = Passes(model)
    answers = answer(FastBackend, model, tokenizer, asked, SAMPLING, batch_size=4)
    lengths = [len(one.output_ids) for one in answers]
    until_a_look = sum(length + CHECK_EVERY_ON_CPU - 1 for length in lengths)
    assert passes.num_steps < until_a_look / 4 + max(lengths)


@pytest.mark.parametrize("place", [3, 4, 5, 8, 9])
def test_a_stop_string_ends_an_answer_with_the_token_that_completes_it(model, tokenizer, place):
    """Before, at and after a look of the host."""
    asked = requests(*MIXED)
    params = GREEDY | {"eos_token_id": 89}
    whole = answer(HFBackend, model, tokenizer, asked, params)
    text = tokenizer.decode(whole[0].output_ids[:place])
    params |= {"stop_strings": [text[-2:]]}
    expected = answer(HFBackend, model, tokenizer, asked, params, batch_size=1)
    assert answer(FastBackend, model, tokenizer, asked, params) == expected
    assert expected[0].finish_reason == "stop"


def test_a_stop_string_may_begin_in_the_prompt(model, tokenizer):
    asked = requests(*MIXED)
    params = GREEDY | {"eos_token_id": 89}
    whole = answer(HFBackend, model, tokenizer, asked, params)
    params |= {"stop_strings": [tokenizer.decode([asked[1].input_ids[-1], whole[1].output_ids[0]])]}
    expected = answer(HFBackend, model, tokenizer, asked, params, batch_size=1)
    assert len(expected[1].output_ids) == 1
    assert answer(FastBackend, model, tokenizer, asked, params) == expected


@pytest.mark.parametrize("params", [GREEDY, SAMPLING, GREEDY | {"remove_invalid_values": True}])
def test_nan_stays_in_its_row(model, tokenizer, params):
    """And nothing of it is left for the next answer of that row, told or not."""
    token = 60
    model.get_input_embeddings().weight[token] = torch.nan
    first, *others = requests(*MIXED)
    asked = [replace(first, input_ids=[token, *first.input_ids]), *others]
    expected = answer(HFBackend, model, tokenizer, asked, params, batch_size=1)
    answers = answer(FastBackend, model, tokenizer, asked, params)
    assert answers[1:] == expected[1:]
    assert [one.had_nan for one in answers] == [one.had_nan for one in expected]


def test_memory_that_ends_while_prompts_are_read_halves_the_rows(model, tokenizer, monkeypatch):
    prefill, begun = Decoder.prefill, []

    def limited(self: Decoder, rows: Any, prefixes: Any) -> int:
        begun.append(self.num_rows)
        if len(begun) == 3:
            raise torch.OutOfMemoryError("planted")
        return prefill(self, rows, prefixes)

    asked = requests(*MIXED)
    expected = answer(FastBackend, model, tokenizer, asked, SAMPLING)
    monkeypatch.setattr(Decoder, "prefill", limited)
    assert answer(FastBackend, model, tokenizer, asked, SAMPLING, batch_size=5) == expected
    assert begun[:3] == [5] * 3
    assert set(begun[3:]) == {3}


def test_what_is_made_ready_is_tried_and_captured_once(model, tokenizer, monkeypatch):
    """On CUDA tests/gpu counts captures."""
    from verl_valgen.backends.fast import suitability

    monkeypatch.setattr(suitability, "_findings", {})
    kinds = (*PARAMETERS.values(), GREEDY | {"num_beams": 2}, SAMPLING | {"repetition_penalty": 1.3})
    asked = [replace(one, params=params) for params, one in zip(itertools.cycle(kinds), requests(*MIXED), strict=False)]
    expected = answer(FastBackend, copy.deepcopy(model), tokenizer, asked)
    with torch.no_grad():
        backend = FastBackend(model, tokenizer, 0, Limits(batch_size=3))
        backend.make_ready(asked)
        monkeypatch.setattr(suitability, "decoded_logits", None)
        loop = backend.loop
        assert loop is not None
        assert backend.generate(asked) == expected
    assert backend.loop is None


def test_memory_that_ends_while_it_is_made_ready_halves_the_rows(model, tokenizer, monkeypatch):
    asked = [replace(one, params=SAMPLING) for one in requests(*MIXED)]
    expected = answer(FastBackend, model, tokenizer, asked)
    sizes: list[int] = []

    def capture(self: DecodingLoop, kind: str, method: Any, nums_rows: Any) -> None:
        sizes.append(self.num_rows)
        if self.num_rows > 3:
            raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(DecodingLoop, "capture", capture)
    backend = FastBackend(model, tokenizer, 0, Limits(batch_size=8))
    with torch.no_grad():
        backend.make_ready(asked)
        assert sizes == [8, 4, 2]
        assert backend.generate(asked) == expected
    assert sizes == [8, 4, 2]


def test_what_cannot_be_captured_is_answered_by_hugging_faces_loop(model, tokenizer, monkeypatch, caplog):
    """And the other kinds in ours."""
    asked = [replace(one, params=(SAMPLING, GREEDY)[i % 2]) for i, one in enumerate(requests(*MIXED))]
    expected = answer(HFBackend, model, tokenizer, asked, batch_size=1)

    def capture(self: DecodingLoop, kind: str, method: Any, nums_rows: Any) -> None:
        if "('do_sample', True)" in kind:
            raise UnsuitableError("a step cannot be captured: planted")

    monkeypatch.setattr(DecodingLoop, "capture", capture)
    backend = FastBackend(model, tokenizer, 0, Limits(batch_size=3))
    with torch.no_grad(), caplog.at_level("DEBUG", "verl_valgen"):
        backend.make_ready(asked)
        answers = backend.generate(asked)
    assert answers == expected
    assert "Hugging Face's loop: a step cannot be captured: planted" in caplog.text
    assert max(one.num_before for one in answers[::2]) == 0 < max(one.num_before for one in answers[1::2])


def test_a_prompt_that_could_not_be_read_is_not_taken_for_one_that_a_row_holds(model, tokenizer):
    """One of its tokens does not exist, so that a run ends when it is read together with others."""
    asked = [replace(one, params=params) for params in (SAMPLING, GREEDY) for one in requests(30, 50, 60, 70)]
    expected = answer(HFBackend, model, tokenizer, asked, batch_size=1)
    bad = Request([500, *range(5, 85)], (9, 0), SAMPLING)
    backend = FastBackend(model, tokenizer, 0, Limits(batch_size=8))
    with torch.no_grad():
        backend.make_ready([*asked, bad])
        *others, last = backend.generate([*asked, bad])
    assert last.finish_reason == "error"
    assert others[4:] == expected[4:]


def test_no_answer_lacks_its_logprob_when_hugging_faces_loop_goes_on(model, tokenizer, monkeypatch):
    """Nor when there was no memory for it beside the rows."""
    step, mean_logprob, steps, calls = Decoder.step, FastBackend.mean_logprob, [], []

    def ending(self: Decoder, *args: Any) -> Any:
        steps.append(args)
        if len(steps) == 30:
            raise UnsuitableError("planted")
        return step(self, *args)

    def limited(self: Any, *args: Any) -> float:
        calls.append(len(steps))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("planted")
        return mean_logprob(self, *args)

    asked = [replace(one, params=SAMPLING, wants_logprob=True) for one in requests(*MIXED)]
    expected = answer(HFBackend, model, tokenizer, asked, batch_size=1)
    answer(FastBackend, model, tokenizer, asked[:1])  # what is tried is tried
    monkeypatch.setattr(Decoder, "step", ending)
    monkeypatch.setattr(FastBackend, "mean_logprob", limited)
    answers = answer(FastBackend, model, tokenizer, asked)
    assert calls[0] < 30 == len(steps)
    assert [one.output_ids for one in answers] == [one.output_ids for one in expected]
    assert [one.mean_logprob for one in answers] == pytest.approx([one.mean_logprob for one in expected], rel=1e-4)


def test_noise_is_prepared_for_the_rows_alone(model, tokenizer, monkeypatch):
    sizes, stream_keys = [], loop.stream_keys

    def noting(seed: int, rows: Any, *args: Any) -> Any:
        sizes.append(len(rows))
        return stream_keys(seed, rows, *args)

    monkeypatch.setattr(loop, "stream_keys", noting)
    answer(FastBackend, model, tokenizer, requests(*MIXED), SAMPLING)
    assert max(sizes) == 3
    assert sum(sizes) == len(MIXED)


def test_a_deadline_bounds_the_logprobs_too(model, tokenizer, monkeypatch):
    now = [0.0]

    class Clock:
        time = staticmethod(lambda: now[0])
        perf_counter = staticmethod(lambda: 0.0)

    def slow(self: Any, *args: Any) -> float:
        now[0] += 1.0
        return -1.0

    for module in (loop, hf, fast_backend):
        monkeypatch.setattr(module, "time", Clock)
    monkeypatch.setattr(FastBackend, "mean_logprob", slow)
    asked = [replace(one, params=GREEDY | {"max_new_tokens": 3}, wants_logprob=True) for one in requests(*[9] * 40)]
    answers = answer(FastBackend, model, tokenizer, asked, batch_size=8, deadline=9.5)
    assert sum(bool(one.output_ids) for one in answers) == now[0] == 16


def test_a_row_from_which_an_answer_has_moved_writes_behind_what_it_holds(model):
    """It goes on in vain, and its prompt may be asked for again."""
    prompts = [list(range(5, 25)), list(range(30, 36))]
    decoder, method = Decoder(model, 2, 64, 8), Method(None, (), 0)
    with torch.no_grad():
        decoder.prefill([0, 1], prompts)
        decoder.begin([1], [NOTHING._replace(tokens=3, slots=6, limits=8, has_ended=0)], None)
        held = decoder.cache.layers[0].keys[0, :, :20].clone()
        decoder.move([1], [0], [6], [20])
        decoder.step(method, 2, 64)
    assert torch.equal(decoder.cache.layers[0].keys[1, :, :20], held)


def test_what_begins_together_takes_no_more_memory_than_a_batch(model, tokenizer, monkeypatch):
    """However many rows there are: neither to read prompts, nor in Hugging Face's loop."""
    read, batches = [], []
    prefill, left_pad = Decoder.prefill, hf.left_pad

    def noting(self: Decoder, rows: Any, prefixes: Any) -> int:
        read.append(len(rows) * max(map(len, prefixes)))
        return prefill(self, rows, prefixes)

    def padding(prompts: Any, device: Any) -> Any:
        batches.append(len(prompts))
        return left_pad(prompts, device)

    asked = requests(*[101] * 70, **GREEDY | {"max_new_tokens": 2, "repetition_penalty": 1.3})
    answer(FastBackend, model, tokenizer, asked[:1])
    monkeypatch.setattr(Decoder, "prefill", noting)
    monkeypatch.setattr(hf, "left_pad", padding)
    answer(FastBackend, model, tokenizer, asked, batch_size=256)
    assert sum(read) == 70 * 100
    assert max(read) <= MOST_PROMPT_TOKENS
    assert batches == [64, 6]
    monkeypatch.setattr(fast_backend, "why_unsuitable", lambda *args: "planted")
    answer(FastBackend, model, tokenizer, requests(*[9] * 70), GREEDY | {"max_new_tokens": 2}, batch_size=256)
    assert batches[-2:] == [64, 6]


# What a trial must find, as forward passes that are other ones in our loop alone


def sees_what_another_left(kwargs: dict[str, Any]) -> None:
    """As if it knew no mask of a step."""
    if kwargs["input_ids"].shape[1] == 1:
        kwargs["attention_mask"] = torch.zeros_like(kwargs["attention_mask"])


def reads_its_padding(kwargs: dict[str, Any]) -> None:
    """As if positions were counted from the end of what is read."""
    if kwargs["input_ids"].shape[1] > 1 and len(kwargs["input_ids"]) > 1:
        is_padding = (kwargs["input_ids"] == kwargs["input_ids"][:, -1:]).flip(1).cumprod(1).flip(1)
        kwargs["position_ids"] = kwargs["position_ids"] + is_padding.sum(1, keepdim=True) - 1


def takes_the_first_rows_position(kwargs: dict[str, Any]) -> None:
    """As if all rows held as many tokens."""
    if kwargs["input_ids"].shape[1] == 1:
        kwargs["position_ids"] = kwargs["position_ids"][:1].expand_as(kwargs["position_ids"])


@pytest.mark.parametrize("fault", [sees_what_another_left, reads_its_padding, takes_the_first_rows_position])
def test_a_trial_finds_what_rows_do_not_suit(model, tokenizer, monkeypatch, fault):
    from verl_valgen.backends.fast import suitability

    monkeypatch.setattr(suitability, "_findings", {})
    asked = requests(*MIXED)
    expected = answer(HFBackend, model, tokenizer, asked, GREEDY, batch_size=1)

    def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        kwargs["input_ids"] = input_ids
        if isinstance(kwargs.get("past_key_values"), RowCache):
            fault(kwargs)
        return type(model).forward(self, **kwargs)

    odd = copy.deepcopy(model)
    odd.__class__ = type("OddForCausalLM", (type(model),), {"forward": forward})
    backend = FastBackend(odd, tokenizer, 0, Limits(batch_size=3))
    with torch.no_grad():
        assert backend.generate([replace(one, params=GREEDY) for one in asked]) == expected
    assert str(backend.unsuitable).startswith("its logits differ by")


@pytest.mark.parametrize("needs_no_kernels", [True, False])
def test_a_model_that_fails_with_kernels_is_tried_without_them(model, monkeypatch, caplog, needs_no_kernels):
    from verl_valgen.backends.fast import kernels, suitability

    decoded_logits = suitability.decoded_logits

    def failing(*args: Any, **kwargs: Any) -> Any:
        if kernels.are_available(model.device) or not needs_no_kernels:
            raise RuntimeError("planted")
        return decoded_logits(*args, **kwargs)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "_why_unavailable", lambda device_type: None)
    monkeypatch.setattr(kernels, "_given_up", [])
    monkeypatch.setattr(suitability, "_findings", {})
    monkeypatch.setattr(suitability, "decoded_logits", failing)
    with torch.no_grad(), caplog.at_level("DEBUG", kernels.__name__):
        finding = suitability.try_model(model, requests(*MIXED, **GREEDY), may_fuse=False)
    assert (finding.unsuitable is None) is needs_no_kernels
    assert len(caplog.records) == needs_no_kernels
    assert kernels.are_available(model.device) is not needs_no_kernels
