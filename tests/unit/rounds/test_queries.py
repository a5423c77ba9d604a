"""Strategies, completions and parameters of rows: which requests they become, and which completions are kept."""

from __future__ import annotations

import logging
import math

import pandas as pd
import pytest

from verl_valgen.prompts.answers import AnswerReader
from verl_valgen.prompts.columns import row_data
from verl_valgen.prompts.tokens import Decoder
from verl_valgen.records import Completion, Prompt, RowData
from verl_valgen.rounds.queries import make_queries, make_requests, make_samples, pair, with_global_parameters
from verl_valgen.settings.checks import ConfigError
from verl_valgen.settings.load import GenerationSettings

GLOBAL = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.7, "max_new_tokens": 100}


def settings(**others: object) -> GenerationSettings:
    return GenerationSettings(enabled=True, **others)  # type: ignore[arg-type]


def prompts(*params: object) -> list[Prompt]:
    return [Prompt(7 + row, [row], f"question {row}", None, RowData(params=own)) for row, own in enumerate(params)]


def test_without_strategies_each_prompt_is_asked_once():
    queries = make_queries(prompts(None, None), settings())
    assert [(q.index, q.strategy, q.params, q.num_completions) for q in queries] == [
        (0, "default", GLOBAL, 1),
        (1, "default", GLOBAL, 1),
    ]
    assert [request.key for request in make_requests(queries)] == [(7, 0), (8, 0)]
    assert not any(request.wants_logprob for request in make_requests(queries))


def test_every_prompt_is_asked_under_each_strategy_and_a_deterministic_one_once():
    strategies = {
        "greedy": {"do_sample": False},
        "beam": {"do_sample": False, "num_beams": 4},
        "hot": {"temperature": 2},
    }
    queries = make_queries(prompts(None, None), settings(n=3, strategies=strategies))
    assert [(q.strategy, q.index, q.num_completions) for q in queries] == [
        *(("greedy", i, 1) for i in (0, 1)),
        *(("beam", i, 1) for i in (0, 1)),
        *(("hot", i, 3) for i in (0, 1)),
    ]
    assert queries[0].params == {"do_sample": False, "max_new_tokens": 100}
    assert queries[2].params == {"do_sample": False, "max_new_tokens": 100, "num_beams": 4}
    assert queries[4].params == GLOBAL | {"temperature": 2.0}
    # The same (row, completion) under each strategy: what differs is the strategy alone.
    assert [request.key for request in make_requests(queries[4:5])] == [(7, 0), (7, 1), (7, 2)]


def test_of_the_candidates_the_likeliest_is_kept(tokenizer):
    (query,) = make_queries(prompts(None), settings(n=3, best_of=3))
    requests = make_requests([query])
    assert [request.key for request in requests] == [(7, number) for number in range(9)]
    assert all(request.wants_logprob for request in requests)
    logprobs = [-2.0, -1.0, -1.0, None, -5.0, -6.0, math.nan, -3.0, -4.0]  # None: the round had no time for it
    candidates = [Completion([i], "eos", logprob) for i, logprob in enumerate(logprobs)]
    answers = pair([query], candidates)
    assert [(answer.number, answer.completion.output_ids) for answer in answers] == [(0, [1]), (1, [4]), (2, [7])]
    (first, *_) = make_samples(answers, 1, 0, "float32", AnswerReader(Decoder(tokenizer)), True)
    assert first.params == GLOBAL | {"best_of": 3, "dtype": "float32"}


def test_answers_come_prompt_by_prompt_side_by_side():
    strategies = {"greedy": {"do_sample": False}, "hot": {"best_of": 2}}
    queries = make_queries(prompts(None, None), settings(n=2, strategies=strategies))
    num_requests = len(make_requests(queries))
    assert num_requests == 2 + 8
    completions = [Completion([i], "eos", float(i)) for i in range(num_requests)]
    assert [
        (answer.query.index, answer.query.strategy, answer.number, answer.completion.output_ids)
        for answer in pair(queries, completions)
    ] == [
        (0, "greedy", 0, [0]), (0, "hot", 0, [3]), (0, "hot", 1, [5]),
        (1, "greedy", 0, [1]), (1, "hot", 0, [7]), (1, "hot", 1, [9]),
    ]  # fmt: skip


@pytest.mark.parametrize("own", [{"temperature": 0.3, "min_p": None}, '{"temperature": 0.3}'], ids=["mapping", "json"])
def test_a_rows_own_parameters_go_before_the_global_ones_and_a_strategys_before_both(own):
    strategies = {"plain": {}, "hot": {"temperature": 2.0, "min_p": 0.1}}
    queries = make_queries(prompts(own, None), settings(strategies=strategies))
    assert [(q.strategy, q.index, q.params["temperature"]) for q in queries] == [
        ("plain", 0, 0.3), ("plain", 1, 1.0), ("hot", 0, 2.0), ("hot", 1, 2.0),
    ]  # fmt: skip
    assert "min_p" not in queries[0].params


def test_a_strategy_can_unset_what_is_set_for_all():
    made = settings(extra={"repetition_penalty": 1.5}, strategies={"a": {}, "b": {"repetition_penalty": None}})
    first, second = make_queries(prompts(None), made)
    assert first.params == GLOBAL | {"repetition_penalty": 1.5}
    assert second.params == GLOBAL


@pytest.mark.parametrize("empty", [None, "", {}, {"temperature": None}, "{}"])
def test_an_empty_cell_changes_nothing(empty, caplog):
    (query,) = make_queries(prompts(empty), settings())
    assert query.params == GLOBAL
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"temprature": 3}, "unknown key generation_params.temprature: did you mean generation_params.temperature?"),
        ({"temperature": -1}, "generation_params.temperature must be a number > 0"),
        ({"top_p": 2, "n": 3}, "generation_params.top_p must be a number in (0, 1], got 2; generation_params: n is"),
        ({"custom_generate": "x"}, "generation_params.custom_generate is not supported: it would load or run code"),
        ({"seed": 3}, "generation_params: seed is set once for the run, as generation.seed"),
        ({"n": 3}, "generation_params: n is set once for the run, as generation.n"),
        ({"max_val_samples": 3}, "generation_params: max_val_samples is set once for the run, as trainer.max_val_s"),
        ({"num_beams": 2}, "generation_params.num_beams must be 1 with do_sample=true"),
        ({"early_stopping": [1]}, "generation_params: transformers refuses these parameters"),
        ({"suppress_tokens": b"x"}, "generation_params.suppress_tokens must be free of NaN and infinity, and of"),
        ({"eos_token_id": "abc"}, "generation_params.eos_token_id must have ids of tokens, got 'abc'"),
        ({"eos_token_id": [1, 100]}, "generation_params.eos_token_id must have ids of tokens, below 100, got 100"),
        ({"bad_words_ids": [[1], [2, -1]]}, "generation_params.bad_words_ids must have ids of tokens, got -1"),
        ({"sequence_bias": [[[5, 400], -2.5]]}, "generation_params.sequence_bias must have ids of tokens, below 100"),
        ({"pad_token_id": 3}, "generation_params.pad_token_id is not supported: it is the model's own that is used"),
        ("{", "generation_params: it is no JSON"),
        ("[1]", "generation_params: it must be a mapping or JSON of one, got a list"),
        (3, "generation_params: it must be a mapping or JSON of one, got a int"),
        ({"\x1b[31m": 3}, "unknown key generation_params.\\x1b[31m"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_and_runs_on_the_global_parameters(own, reason, caplog):
    with caplog.at_level(logging.WARNING, "verl_valgen"):
        queries = make_queries(prompts(None, own), settings(), vocab_size=100)
    assert [q.params for q in queries] == [GLOBAL, GLOBAL]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"row 8: {reason}")
    assert record.getMessage().endswith("; it is answered with the global parameters")
    assert record.getMessage().isprintable()


def test_a_row_with_what_the_backend_lacks_is_named_and_runs_on_the_global_parameters(caplog):
    first, second = make_queries(prompts({"typical_p": 0.5}, {"top_k": 3}), settings(backend="vllm"))
    assert (first.params, second.params) == (GLOBAL, GLOBAL | {"top_k": 3})
    (message,) = caplog.messages
    assert "typical_p: generation.backend=vllm has no such parameter; use fast or hf" in message
    assert [query.params["typical_p"] for query in make_queries(prompts({"typical_p": 0.5}), settings())] == [0.5]


def test_integers_of_a_table_whose_rows_set_different_parameters(tmp_path):
    """pandas, with which verl reads its data, makes floating-point numbers of them."""
    params = [{"max_new_tokens": 3, "suppress_tokens": [4], "repetition_penalty": 2.0}, {"temperature": 2.0}]
    pd.DataFrame({"generation_params": params}).to_parquet(tmp_path / "rows.parquet")
    column = pd.read_parquet(tmp_path / "rows.parquet")["generation_params"]
    own = [row_data({"generation_params": value}, "generation_params").params for value in column]
    first, second = make_queries(prompts(*own), settings())
    assert first.params == GLOBAL | {"max_new_tokens": 3, "suppress_tokens": [4], "repetition_penalty": 2.0}
    assert second.params == GLOBAL | {"temperature": 2.0}
    assert isinstance(first.params["max_new_tokens"], int)
    assert isinstance(first.params["repetition_penalty"], float)  # transformers insists on that


def test_a_row_that_only_one_strategy_refuses_runs_on_the_global_parameters_under_all(caplog):
    made = settings(strategies={"beam": {"do_sample": False, "num_beams": 2}, "greedy": {"do_sample": False}})
    queries = make_queries(prompts({"stop_strings": ["x"]}), made)
    assert not any("stop_strings" in q.params for q in queries)
    assert "row 7: generation_params, under generation.strategies.beam.stop_strings cannot be combined" in caplog.text


def test_prompts_without_a_row_have_random_numbers_of_their_own():
    own = Prompt(None, [1], "own", None, stream=1 << 31)
    (query,) = make_queries([own], settings())
    assert make_requests([query])[0].key == (1 << 31, 0)


def test_a_token_that_the_model_has_not_is_refused_for_all():
    with pytest.raises(ConfigError, match=r"generation.bad_words_ids must have ids of tokens, below 100, got 100"):
        make_queries(prompts(None), settings(extra={"bad_words_ids": [[100]]}), vocab_size=100)


def test_what_failed_is_asked_with_the_global_parameters():
    (query,) = make_queries(prompts({"temperature": 0.3}), settings(strategies={"two": {"top_k": 3}}))
    assert query.params["temperature"] == 0.3
    assert with_global_parameters(query, settings(strategies={"two": {"top_k": 3}})).params == GLOBAL | {"top_k": 3}


def test_a_record_has_answer_and_reference_as_they_are_shown_and_whole(tokenizer):
    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    texts = {"reference": "hm</think>4", "reference_raw": "hm</think>4<|im_end|>", "reference_text": "hm</think>four"}
    prompt = Prompt(0, ids("<|im_start|>1+3?"), "1+3?", **texts)
    (query,) = make_queries([prompt], settings())
    completion = Completion([*ids("so</think> 5"), 10_000, tokenizer.eos_token_id], "eos")
    (sample,) = make_samples(
        pair([query], [completion]), 1, 0, "float32", AnswerReader(Decoder(tokenizer), "</think>"), None
    )
    record = sample.to_dict()
    first = list(record).index("prompt")
    assert list(record)[first : first + 8] == [
        *("prompt", "prompt_text", "generation", "generation_raw", "reference", "reference_raw", "reference_text"),
        "finish_reason",
    ]
    assert record["prompt"] == "<|im_start|>1+3?"
    assert (record["generation"], record["generation_raw"]) == ("5\ufffd", "so</think> 5\ufffd<|im_end|>")
    assert (record["reference"], record["reference_raw"]) == ("4", "hm</think>4<|im_end|>")
    assert record["reference_text"] == "hm</think>four"
    assert "whole_generation" not in record
    assert sample.whole_generation == "so</think> 5\ufffd"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (Prompt(6, [1], "a", None), "row 6"),
        (
            Prompt(6, [1], "a", None, file="b.parquet", not_shown="2 turns, 3 tools"),
            "row 6 of b.parquet, 2 turns, 3 tools",
        ),
        (Prompt(None, [1], "a", None, own_place="own.jsonl line 3", not_shown="1 tool"), "own.jsonl line 3, 1 tool"),
        (Prompt(None, [1], "a", None), None),
    ],
)
def test_a_record_says_where_its_prompt_comes_from(tokenizer, prompt, expected):
    answers = pair(make_queries([prompt], settings()), [Completion([1], "eos")])
    (sample,) = make_samples(answers, 1, 0, "float32", AnswerReader(Decoder(tokenizer)), None)
    record = sample.to_dict()
    assert record["origin"] == expected
    names = list(record)
    assert names[names.index("file") + 1] == "origin"
