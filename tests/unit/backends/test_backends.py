"""The contract of a backend: the answer to a request depends on that request alone."""

from __future__ import annotations

from dataclasses import replace

import assets
import pytest
import torch
from checkpoints import plain_greedy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from verl_valgen.backends import BACKENDS, backend_class, ways
from verl_valgen.backends.base import Limits
from verl_valgen.backends.fast.backend import FastBackend
from verl_valgen.backends.hf import HFBackend, finish
from verl_valgen.records import Completion, Request
from verl_valgen.settings.generation_config import special_tokens

GREEDY = {"do_sample": False, "max_new_tokens": 9}
SAMPLING = {"do_sample": True, "max_new_tokens": 9, "temperature": 1.3, "top_k": 30, "top_p": 0.95}
CONTEXT = 96


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    assets.write_model(path, max_position_embeddings=CONTEXT)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def model(directory, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    # Nothing but special tokens may come from the model's own generation config.
    model.generation_config.update(repetition_penalty=5.0, top_k=1, max_length=3)
    model.generation_config = special_tokens(model.generation_config, tokenizer)
    return model


@pytest.fixture(params=[name for name in BACKENDS if not ways(name, "cpu")[0].is_engine])  # those have tests/vllm
def answer(request, model, tokenizer):
    def generate(requests, params, seed=0, **limits):
        backend = backend_class(request.param, "cpu")(model, tokenizer, seed, Limits(**limits))
        counted: list[int] = []
        backend.on_answers = counted.append
        with torch.no_grad():
            answers = backend.generate([replace(request, params=request.params | params) for request in requests])
        assert "deadline" in limits or sum(counted) == len(answers) == len(requests)  # each was told once
        return answers

    return generate


def requests_of_lengths(*lengths: int) -> list[Request]:
    return [
        Request([5 + (row * 7 + i) % 80 for i in range(length)], (row, 0), {}) for row, length in enumerate(lengths)
    ]


MIXED = (3, 40, 1, 17, 17, 5, 60, 2)


# These look at the prompt's tokens, and would take padding for text.
PENALISED = GREEDY | {"repetition_penalty": 3.0}
NO_REPEATS = SAMPLING | {"no_repeat_ngram_size": 1}


@pytest.mark.parametrize(
    "params",
    [pytest.param(GREEDY, marks=pytest.mark.slow), SAMPLING, NO_REPEATS, GREEDY | {"num_beams": 2}],
    ids=["greedy", "sampling", "no-repeats", "beams"],
)
def test_answers_that_met_nan_are_known(answer, model, params):
    """NaN stays with the answers that it occurred in, and does not leak into the next batch.

    The first batch has answers with and without. They are longer than the next prompts, so that they leave more in a
    cache than those overwrite.
    """
    token = 50
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    first, *others = requests_of_lengths(2, 1, 5, 4, 7, 6)
    requests = [replace(first, input_ids=[token, *first.input_ids]), *others]
    answers = answer(requests, params | {"max_new_tokens": 30}, batch_size=2)
    met = [token in request.input_ids + done.output_ids[:-1] for request, done in zip(requests, answers, strict=True)]
    assert [done.had_nan for done in answers] == met
    assert sorted(len(request.input_ids) for request in requests if token in request.input_ids) == [3]
    assert not all(met)


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(GREEDY, marks=pytest.mark.slow),
        SAMPLING,
        pytest.param(PENALISED, marks=pytest.mark.slow),
        NO_REPEATS,
    ],
    ids=["greedy", "sampling", "penalised", "no-repeats"],
)
def test_neither_batch_size_nor_order_matters(answer, params):
    requests = requests_of_lengths(*MIXED * 3)[:21]
    together = answer(requests, params)
    assert together == [answer([request], params)[0] for request in requests]
    for batch_size in (2, 5, 8):
        assert together == answer(requests, params, batch_size=batch_size)
    assert together[::-1] == answer(requests[::-1], params)


def test_greedy_is_that_of_a_plain_model(answer, model):
    requests = requests_of_lengths(*MIXED)
    expected = [plain_greedy(model, request.input_ids, 9) for request in requests]
    assert [completion.output_ids for completion in answer(requests, GREEDY)] == expected


def test_the_same_seed_gives_the_same_text_and_another_one_another(answer):
    requests = requests_of_lengths(*MIXED)
    assert answer(requests, SAMPLING) == answer(requests, SAMPLING)
    assert answer(requests, SAMPLING) != answer(requests, SAMPLING, seed=1)
    again = [Request(request.input_ids, (row, 1), {}) for row, request in enumerate(requests)]
    assert answer(requests, SAMPLING) != answer(again, SAMPLING)


def test_no_global_random_state_is_used(answer):
    before = torch.get_rng_state()
    answer(requests_of_lengths(3, 4), SAMPLING)
    assert torch.equal(before, torch.get_rng_state())


def test_max_new_tokens_are_respected(answer):
    for completion in answer(requests_of_lengths(*MIXED), GREEDY | {"max_new_tokens": 4}):
        assert len(completion.output_ids) <= 4
        assert completion.finish_reason == ("eos" if len(completion.output_ids) < 4 else completion.finish_reason)


def test_the_context_is_never_left(answer, model):
    requests = requests_of_lengths(CONTEXT - 4, 10, CONTEXT, CONTEXT + 8)
    completions = answer(requests, GREEDY)
    assert [len(completion.output_ids) for completion in completions] == [4, 9, 0, 0]
    assert [completions[i].finish_reason for i in (0, 2, 3)] == ["length"] * 3
    assert completions[1].output_ids == plain_greedy(model, requests[1].input_ids, 9)


def test_end_of_sequence_is_counted_and_ends(answer, tokenizer):
    requests = requests_of_lengths(4, 9)
    eos = answer(requests, GREEDY)[0].output_ids[3]
    completions = answer(requests, GREEDY | {"eos_token_id": [eos, 0]})
    first = completions[0].output_ids
    assert first[-1] == eos
    assert eos not in first[:-1]
    assert completions[0].finish_reason == "eos"


def test_stop_strings_end_and_are_kept_apart_from_padding(answer, tokenizer):
    requests = requests_of_lengths(4, 9, 30)
    texts = [tokenizer.decode(completion.output_ids) for completion in answer(requests, GREEDY)]
    stop = texts[0][2:4]
    completions = answer(requests, GREEDY | {"stop_strings": [stop]})
    assert completions[0].finish_reason == "stop"
    assert tokenizer.decode(completions[0].output_ids) == texts[0][: texts[0].index(stop) + len(stop)]
    assert [c.finish_reason for c, text in zip(completions, texts, strict=True) if stop not in text] == [
        "length"
    ] * sum(stop not in text for text in texts)


def test_beam_search_and_other_fields_reach_transformers(answer, model):
    requests = requests_of_lengths(4, 9)
    beams = answer(requests, GREEDY | {"num_beams": 3, "repetition_penalty": 1.5})
    config = GenerationConfig(
        num_beams=3, repetition_penalty=1.5, max_new_tokens=9, eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=0,
    )  # fmt: skip
    expected = [
        model.generate(torch.tensor([r.input_ids]), generation_config=config)[0, len(r.input_ids) :] for r in requests
    ]
    assert [completion.output_ids for completion in beams] == [ids.tolist() for ids in expected]


KINDS = [GREEDY, SAMPLING, PENALISED, GREEDY | {"num_beams": 2}, SAMPLING | {"max_new_tokens": 4}]


def test_requests_of_different_parameters_go_together(answer):
    requests = [replace(one, params=KINDS[i % len(KINDS)]) for i, one in enumerate(requests_of_lengths(*MIXED * 2))]
    alone = [answer([one], {})[0] for one in requests]
    assert answer(requests, {}) == answer(requests, {}, batch_size=3) == alone


def test_how_likely_an_answer_is_where_it_is_asked_for(answer, model):
    requests = [
        replace(one, wants_logprob=i % 2 == 0) for i, one in enumerate(requests_of_lengths(*MIXED[:4], CONTEXT))
    ]
    completions = answer(requests, SAMPLING | {"repetition_penalty": 1.5})
    assert [one.output_ids for one in completions] == [
        one.output_ids
        for one in answer(requests_of_lengths(*MIXED[:4], CONTEXT), SAMPLING | {"repetition_penalty": 1.5})
    ]
    has_logprob = [one.mean_logprob is not None for one in completions]
    assert has_logprob == [True, False, True, False, False]  # the last is empty
    for request, one in zip(requests[:3:2], completions[:3:2], strict=True):
        logprobs = []
        for i, token in enumerate(one.output_ids):  # one pass for each token: no padding, nothing to slice
            logits = model(torch.tensor([request.input_ids + one.output_ids[:i]])).logits[0, -1]
            logprobs.append(logits.log_softmax(-1)[token].item())
        assert one.mean_logprob == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-5)


def test_nothing_is_asked_nothing_is_answered(answer):
    assert answer([], GREEDY) == []


def test_the_tokenizer_is_left_as_it_was(answer, tokenizer):
    before = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token)
    answer(requests_of_lengths(3, 9), GREEDY | {"stop_strings": ["a"]})
    assert (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token) == before


@pytest.mark.parametrize(
    ("output_ids", "stop_length", "nan_length", "limit", "expected"),
    [
        ([4, 5, 6], None, None, 3, Completion([4, 5, 6], "length")),
        ([4, 5], None, None, 3, Completion([4, 5], "time")),
        ([4, 2, 0, 0], None, None, 4, Completion([4, 2], "eos")),
        ([4, 2, 2, 2], None, None, 4, Completion([4, 2], "eos")),  # padded with the end-of-sequence token
        ([4, 5, 2, 2], 2, None, 4, Completion([4, 5], "stop")),
        ([4, 2, 2, 2], 2, None, 4, Completion([4, 2], "eos")),
        ([4, 2, 0, 0], None, 1, 4, Completion([4, 2], "eos", had_nan=True)),
        ([4, 2, 0, 0], None, 2, 4, Completion([4, 2], "eos")),  # while the others of the batch went on
    ],
)
def test_finish(output_ids, stop_length, nan_length, limit, expected):
    assert finish(output_ids, {2}, stop_length, nan_length, limit) == expected


def test_special_tokens_without_a_padding_token(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = None
    assert special_tokens(GenerationConfig(eos_token_id=[7, 8]), tokenizer).pad_token_id == 7
    assert special_tokens(None, tokenizer).eos_token_id == tokenizer.eos_token_id
    own = special_tokens(GenerationConfig(eos_token_id=7, pad_token_id=3, repetition_penalty=2.0), tokenizer)
    assert (own.eos_token_id, own.pad_token_id) == (7, 3)
    assert own.repetition_penalty == GenerationConfig().repetition_penalty != 2.0


def test_auto_is_the_fast_one_on_cuda_and_cpu():
    assert backend_class("auto", "cuda") is backend_class("auto", "cpu") is FastBackend
    assert backend_class("auto", "npu") is HFBackend


def test_parameters_that_fail_cost_those_that_have_them(answer):
    requests = requests_of_lengths(*MIXED)
    expected = answer(requests, GREEDY)
    requests[2] = replace(requests[2], params={"exponential_decay_length_penalty": [1]})
    completions = answer(requests, GREEDY)
    assert (completions[2].output_ids, completions[2].finish_reason) == ([], "error")
    assert "IndexError" in completions[2].error
    assert completions[:2] + completions[3:] == expected[:2] + expected[3:]


def test_ways_go_from_the_one_asked_for_to_the_safest():
    assert [way.name for way in ways("auto", "cuda")] == ["fast", "fast, unfused", "hf", "hf, one prompt at a time"]
    assert [way.name for way in ways("fast", "cpu")] == ["fast", "hf", "hf, one prompt at a time"]
    assert ways("auto", "cpu") == ways("fast", "cpu")
    assert ways("auto", "npu") == ways("hf", "cuda") == ways("fast", "cuda")[2:]
    for way in ways("auto", "cuda"):
        assert issubclass(backend_class(way.backend, "cuda"), HFBackend)
        limits = way.within(Limits(batch_size=3, compile=True))
        assert (limits.batch_size, limits.compile) == (3, True)
        assert (limits.fuse, limits.one_at_a_time) == (way.fuse, way.one_at_a_time)


@pytest.mark.parametrize("device_type", ["cuda", "cpu", "npu"])
def test_behind_an_engine_of_others_come_the_ways_that_auto_has(device_type):
    first, *safer = ways("vllm", device_type)
    assert (first.name, first.backend, first.is_engine) == ("vllm", "vllm", True)
    assert safer == ways("auto", device_type)
    assert not any(way.is_engine for way in safer)


def test_one_prompt_at_a_time(answer, model):
    requests = requests_of_lengths(*MIXED)
    answer(requests, GREEDY)  # what is tried is tried
    sizes: set[int] = set()
    model.register_forward_pre_hook(lambda module, args, kwargs: sizes.add(len(kwargs["input_ids"])), with_kwargs=True)
    together = answer(requests, GREEDY, batch_size=4)
    assert max(sizes) == 4
    sizes.clear()
    assert answer(requests, GREEDY, batch_size=4, one_at_a_time=True) == together
    assert sizes == {1}
