"""Answers of vLLM's engine on CPU, beside transformers'."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
import vllm_engines as engines

from verl_valgen.backends.base import Limits
from verl_valgen.backends.judging import logprobs
from verl_valgen.backends.vllm import backend as backend_module
from verl_valgen.backends.vllm.backend import VLLMBackend
from verl_valgen.records import Request


@pytest.fixture(scope="module")
def config(tokenizer):
    return engines.config(len(tokenizer))


@pytest.fixture(scope="module")
def model(config):
    return engines.model(config, 1)


@pytest.fixture(scope="module")
def engine(config):
    engine = engines.engine(config)
    yield engine
    engine.close()


@pytest.fixture
def backend(engine, model, tokenizer):
    engine.load(engines.weights(model))
    return VLLMBackend(engine, tokenizer, 0, Limits(logprobs=True))


@pytest.fixture(scope="module")
def prompts(config):
    return engines.prompts(config.vocab_size)


def test_greedy_answers_are_those_of_the_weights_loaded_last(engine, config, tokenizer, prompts):
    requests = engines.requests(prompts)
    answers = []
    for seed in (1, 2, 1):
        model = engines.model(config, seed)
        engine.load(engines.weights(model))
        completions = VLLMBackend(engine, tokenizer, 0, Limits(logprobs=True)).generate(requests)
        expected = engines.expected(model, tokenizer, requests)
        assert [(c.output_ids, c.finish_reason) for c in completions] == [
            (c.output_ids, c.finish_reason) for c in expected
        ]
        for completion, reference in zip(completions, expected, strict=True):
            assert completion.mean_logprob == pytest.approx(reference.mean_logprob, abs=1e-4)
        answers.append([c.output_ids for c in completions])
    assert answers[0] == answers[2] != answers[1]


@torch.no_grad()
def test_log_probabilities_are_the_models_own_before_any_processor(backend, model, prompts):
    requests = engines.requests(prompts, do_sample=True, temperature=0.7, top_k=5, repetition_penalty=1.3)
    for request, completion in zip(requests, backend.generate(requests), strict=True):
        ids = torch.tensor([request.input_ids + completion.output_ids])
        logits = model(ids).logits[0, len(request.input_ids) - 1 : -1]
        torch.testing.assert_close(
            torch.tensor(list(completion.logprobs)), logprobs(logits, completion.output_ids), atol=1e-4, rtol=0
        )


def test_completions_of_a_prompt_differ_and_are_the_same_again(backend, engine, tokenizer, prompts):
    params = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 24}
    requests = [Request(prompts[0], (0, completion), params) for completion in range(6)]
    first = [c.output_ids for c in backend.generate(requests)]
    again = [c.output_ids for c in backend.generate(requests[::-1])][::-1]
    other = [c.output_ids for c in VLLMBackend(engine, tokenizer, 1).generate(requests)]
    assert first == again
    assert len({tuple(ids) for ids in first}) == len(first)
    assert not {tuple(ids) for ids in first} & {tuple(ids) for ids in other}


def test_sampling_keeps_to_what_top_k_leaves(backend, model, prompts):
    requests = engines.requests(prompts, do_sample=True, temperature=1.0, top_k=1)
    greedy = engines.requests(prompts)
    assert [c.output_ids for c in backend.generate(requests)] == [c.output_ids for c in backend.generate(greedy)]


@pytest.mark.parametrize("params", [{"repetition_penalty": 1.5}, {"min_new_tokens": 12}, {"min_new_tokens": 24}])
def test_parameters_do_as_in_transformers(backend, model, tokenizer, prompts, params):
    plain = [c.output_ids for c in backend.generate(engines.requests(prompts))]
    # Ends that would come early, for the number of tokens to matter.
    params = {**params, "eos_token_id": sorted({ids[4] for ids in plain})}
    requests = engines.requests(prompts, **params)
    completions, expected = backend.generate(requests), engines.expected(model, tokenizer, requests)
    assert [(c.output_ids, c.finish_reason) for c in completions] == [(c.output_ids, c.finish_reason) for c in expected]


def test_greedy_answers_come_with_log_probabilities_where_these_are_wanted(engine, backend, tokenizer, prompts):
    requests = [replace(request, wants_logprob=False) for request in engines.requests(prompts)]
    plain = VLLMBackend(engine, tokenizer, 0).generate(requests)
    assert [c.logprobs for c in plain] == [None] * len(requests)
    assert plain == backend.generate(requests)
    assert all(len(c.logprobs) == len(c.output_ids) for c in backend.generate(requests))


def test_bad_words_do_as_in_transformers(backend, model, tokenizer, prompts):
    plain = [c.output_ids for c in backend.generate(engines.requests(prompts))]
    words = [[ids[3]] for ids in plain] + [ids[8:10] for ids in plain]
    requests = engines.requests(prompts, bad_words_ids=words)
    completions, expected = backend.generate(requests), engines.expected(model, tokenizer, requests)
    assert [c.output_ids for c in completions] == [c.output_ids for c in expected]
    assert [c.output_ids for c in completions] != plain


def test_an_answer_ends_with_the_token_that_completes_a_stop_string(backend, model, tokenizer, prompts):
    plain = [c.output_ids for c in backend.generate(engines.requests(prompts))]
    strings = [tokenizer.decode(plain[0][6:8]), tokenizer.decode(plain[1][-2:])]
    requests = engines.requests(prompts, stop_strings=strings)
    completions, expected = backend.generate(requests), engines.expected(model, tokenizer, requests)
    assert [(c.output_ids, c.finish_reason) for c in completions] == [(c.output_ids, c.finish_reason) for c in expected]
    assert {completions[0].finish_reason, completions[1].finish_reason} == {"stop"}
    assert all(len(c.logprobs) == len(c.output_ids) for c in completions)


def test_answers_that_are_stopped_together_are_given_up_in_order(backend, tokenizer, prompts, monkeypatch):
    """Given up at once they are a set to vLLM, and on each rank in an order of its own."""
    ends = tokenizer.decode(backend.generate(engines.requests(prompts[:1]))[0].output_ids[2:4])
    given_up = []
    vllm = backend.engine.llm_engine
    abort_request = vllm.abort_request
    monkeypatch.setattr(vllm, "abort_request", lambda names: (given_up.append(list(names)), abort_request(names)))
    completions = backend.generate(engines.requests(prompts[:1] * 6, stop_strings=[ends]))
    assert [c.finish_reason for c in completions] == ["stop"] * 6
    assert [[name.partition("-")[2] for name in names] for names in given_up] == [[str(i)] for i in range(6)]


def test_the_ends_that_a_request_names_take_the_place_of_the_models(backend, engine, prompts):
    plain = backend.generate(engines.requests(prompts[:1]))[0].output_ids
    (completion,) = backend.generate(engines.requests(prompts[:1], eos_token_id=[plain[5]]))
    assert (completion.output_ids, completion.finish_reason) == (plain[: plain.index(plain[5]) + 1], "eos")


def test_answers_end_where_the_models_context_does(backend, config, prompts):
    whole = list(range(3, 3 + 60)) * 9
    full, almost = whole[: config.max_position_embeddings], whole[: config.max_position_embeddings - 2]
    requests = [Request(full, (0, 0), {"do_sample": False, "max_new_tokens": 4})]
    assert backend.generate(requests)[0].finish_reason == "length"
    with pytest.raises(ValueError, match="engine was made for"):
        backend.generate([Request(almost, (0, 0), {"do_sample": False, "max_new_tokens": 4})])
    assert not backend.engine.has_failed


def test_what_is_unfinished_at_the_deadline_says_so(engine, backend, tokenizer, prompts, monkeypatch):
    late = VLLMBackend(engine, tokenizer, 0, Limits(deadline=0.0))
    assert {(len(c.output_ids), c.finish_reason) for c in late.generate(engines.requests(prompts))} == {(0, "time")}

    deadline = time.time() + 1e6
    steps = []
    step = engine.llm_engine.step

    def counted():
        steps.append(1)
        if len(steps) == 8:
            monkeypatch.setattr(time, "time", lambda: deadline + 1)
        return step()

    monkeypatch.setattr(engine.llm_engine, "step", counted)
    completions = VLLMBackend(engine, tokenizer, 0, Limits(deadline=deadline)).generate(engines.requests(prompts))
    monkeypatch.undo()
    assert {c.finish_reason for c in completions} == {"time"}
    assert all(0 < len(c.output_ids) <= 8 for c in completions)
    whole = VLLMBackend(engine, tokenizer, 0).generate(engines.requests(prompts))  # nothing is left over
    assert all(c.output_ids[: len(d.output_ids)] == d.output_ids for c, d in zip(whole, completions, strict=True))


def test_a_request_that_vllm_refuses_takes_no_other_with_it(backend, prompts):
    good = engines.requests(prompts)
    bad = Request(prompts[0], (9, 0), {"do_sample": True, "temperature": 5.0, "max_new_tokens": 4})
    told = []
    backend.on_answers = told.append
    completions = backend.generate([good[0], bad, *good[1:]])
    assert completions[1].finish_reason == "error"
    assert "temperature" in completions[1].error
    assert all(c.output_ids for i, c in enumerate(completions) if i != 1)
    assert sum(told) == len(completions)
    assert not backend.engine.has_failed


def test_prompts_wait_until_several_can_be_read_together(engine, backend, model, tokenizer, config, monkeypatch):
    monkeypatch.setattr(backend_module, "_FEWEST_EMPTY", 2)
    num_places = engine.size.max_num_seqs
    prompts = engines.prompts(config.vocab_size, 4 * num_places)
    requests = [
        Request(ids, (i, 0), {"do_sample": False, "max_new_tokens": 3 + 5 * i % 19}) for i, ids in enumerate(prompts)
    ]
    handed_on = [0]  # between steps
    add_request, step = engine.llm_engine.add_request, engine.llm_engine.step

    def counted_request(*args):
        handed_on[-1] += 1
        return add_request(*args)

    def counted_step():
        handed_on.append(0)
        return step()

    monkeypatch.setattr(engine.llm_engine, "add_request", counted_request)
    monkeypatch.setattr(engine.llm_engine, "step", counted_step)
    found = backend.generate(requests)
    assert [c.output_ids for c in found] == [c.output_ids for c in engines.expected(model, tokenizer, requests)]
    numbers = [number for number in handed_on if number]
    assert sum(numbers) == len(requests)
    assert numbers[0] == num_places
    assert all(number >= num_places // 2 for number in numbers[:-1])


def test_an_engine_that_fails_says_so_and_is_of_no_use(backend, engine, prompts, monkeypatch):
    def fail():
        raise RuntimeError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(engine.llm_engine, "step", fail)
        with pytest.raises(RuntimeError, match="no more"):
            backend.generate(engines.requests(prompts))
    assert not engine.serves(engines.SIZE)
    engine.has_failed = False
    assert all(c.output_ids for c in backend.generate(engines.requests(prompts)))


def test_nan_is_noticed(engine, tokenizer, config, prompts):
    broken = engines.model(config, 1)
    broken.model.norm.weight.data.fill_(torch.nan)
    engine.load(engines.weights(broken))
    sampled = engines.requests(prompts, do_sample=True)
    assert all(c.had_nan for c in VLLMBackend(engine, tokenizer, 0).generate(sampled))
    greedy = VLLMBackend(engine, tokenizer, 0, Limits(logprobs=True)).generate(engines.requests(prompts))
    assert all(c.had_nan for c in greedy)
