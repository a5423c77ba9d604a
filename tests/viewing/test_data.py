"""Payloads of the page: everything that a record has, whatever is in its texts, and nothing that is to be withheld."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trackers.destinations import make_sample

from verl_valgen.records import WITHHELD
from verl_valgen.trackers.first_file import missing_types, types_in, with_types
from verl_valgen.trackers.jsonl import _lines
from verl_valgen.viewing.data import index_payload, run_entry, step_payload
from verl_valgen.viewing.script import argument, call, to_json

HOSTILE = "</script><script>alert(1)</script><!-- \u2028\u2029 ]]> --> \x00 \ud83d \u202e '\"\\ {{ 7 }}"


def record(**fields):
    return make_sample(80, **fields).to_dict()


def payload(*records, **numbers):
    return step_payload(80, records, numbers)


def test_a_step_has_each_prompt_once_and_all_answers():
    records = [
        record(index=i, completion=c, strategy=s, row=6 + i, data_source="sums", scores={"exact": 0.5})
        for i in range(2)
        for s in ("greedy", "nucleus")
        for c in range(2)
    ]
    found = payload(*records, num_samples=8.0)
    assert [prompt["row"] for prompt in found["prompts"]] == [6, 7]
    assert [(a["prompt"], a["strategy"], a["completion"]) for a in found["answers"]] == [
        (r["index"], r["strategy"], r["completion"]) for r in records
    ]
    assert found["prompts"][0] == {
        "key": "text 6183866a41c96e64, row 6",
        "index": 0, "row": 6, "file": None, "origin": None, "data_source": "sums",
        "prompt_text": "question 0", "prompt": "<|user|>question 0", "reference": "reference 0", "reference_raw": None,
        "reference_text": None, "ground_truth": None,
    }  # fmt: skip
    assert found["answers"][0] == {
        "prompt": 0, "strategy": "greedy", "completion": 0, "generation": "answer 0 at 80", "generation_raw": None,
        "finish_reason": "eos", "num_new_tokens": 4, "num_prompt_tokens": 3, "scores": {"exact": 0.5},
        "score_texts": {}, "verified": None, "params": {}, "seed": 0,
    }  # fmt: skip
    assert (found["format"], found["run"], found["step"], found["numbers"]) == (1, 0, 80, {"num_samples": 8})


def test_the_same_prompt_has_the_same_key_at_every_step():
    def keys(*records):
        return [prompt["key"] for prompt in payload(*records)["prompts"]]

    row = record(row=6, prompt_text="1+1?", index=0)
    assert keys(row) == keys({**row, "index": 3, "prompt": "of another day"}) != keys({**row, "prompt_text": "2+2?"})
    assert keys(record(row=6)) != keys(record(row=6, file="b.parquet"))
    own = record(row=None, prompt_text="1+1?")
    assert keys(own) == keys({**own, "index": 4, "prompt": "of another day"}) != keys({**own, "prompt_text": "2+2?"})
    poet, pirate = {**own, "origin": "prompts.jsonl line 1"}, {**own, "origin": "prompts.jsonl line 2"}
    assert keys(poet, {**pirate, "index": 1})[1:] == keys(pirate), "a prompt without an answer leaves the next its key"
    # Several turns of one row that are the same, or one prompt twice.
    twice = keys(row, {**row, "index": 1}, {**own, "index": 2}, {**own, "index": 3})
    assert len(set(twice)) == 4


def test_an_answer_that_failed_the_check_is_withheld():
    secret = record(
        verified=False,
        generation="secret",
        generation_raw="secret",
        scores={"exact": 1.0},
        score_texts={"pred": "secret"},
    )
    found = payload(secret)
    assert "secret" not in json.dumps(found)
    (answer,) = found["answers"]
    assert (answer["generation"], answer["scores"], answer["verified"]) == (WITHHELD, {}, False)


def test_a_record_of_an_early_version_is_shown():
    early = {"step": 80, "index": 0, "generation": "Paris", "prompt": "<|user|>France?"}
    found = payload(early)
    assert found["prompts"][0]["prompt_text"] == "<|user|>France?"
    assert (found["answers"][0]["strategy"], found["answers"][0]["generation"]) == ("default", "Paris")
    assert {**found["prompts"][0], **found["answers"][0]}.keys() >= {"origin", "verified", "file", "scores"}


@pytest.mark.parametrize("text", [HOSTILE, "<!--", "</SCRIPT", "\u2028", "\ud800", "\udc00\ud800", "007", "é日本🙂"])
def test_no_text_breaks_out_of_its_script(text):
    names = ("generation", "generation_raw", "prompt", "prompt_text", "reference", "strategy", "data_source")
    hostile = record(**dict.fromkeys(names, text), scores={text: 1.0}, score_texts={text: text}, params={text: [text]})
    script = call("valgen.step", step_payload(80, [hostile], {f"{text}/exact": 1.0}))
    assert script.count(b"\n") == 1  # at its end
    content = script.decode("utf-8")
    assert not re.search("[<\u2028\u2029]", content)
    shown = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    found = argument("valgen.step", script)
    assert found["answers"][0]["generation"] == found["prompts"][0]["prompt_text"] == shown
    assert found["answers"][0]["params"] == {shown: [shown]}
    assert list(found["answers"][0]["scores"]) == [shown]


@pytest.mark.parametrize("text", ["__proto__", '{"__proto__":', ',["__proto__"]:', '\\"__proto__":', '["__proto__"]'])
def test_a_key_that_scripts_read_otherwise_is_kept(text):
    payload = {text: {"a": 1, text: [text, {text: text}]}, "b": [text]}
    script = call("valgen.step", payload)
    assert b'{"__proto__":' not in script
    assert b',"__proto__":' not in script
    assert argument("valgen.step", script) == payload
    assert json.loads(to_json(payload)) == payload, "in the one file there is JSON"


def test_what_json_has_no_word_for_is_left_out():
    odd = {"a": math.nan, "b": math.inf, "c": 1.0, "d": None, "e": True, "f": "text"}
    found = step_payload(80, [record(scores=odd, params={"x": math.nan, "y": [math.inf]})], odd)
    assert found["answers"][0]["scores"] == found["numbers"] == {"c": 1}
    assert json.loads(to_json(found))["answers"][0]["params"] == {"y": [None]}


TEXTS = st.text(st.characters() | st.characters(categories=["Cs"]) | st.sampled_from("<!-/>\u2028\x00"), max_size=40)


@given(st.lists(st.fixed_dictionaries({"generation": TEXTS, "prompt_text": TEXTS, "reference": TEXTS}), min_size=1))
def test_a_payload_holds_the_texts_of_its_records(texts):
    records = [record(index=i, **fields) for i, fields in enumerate(texts)]
    found = argument("valgen.step", call("valgen.step", step_payload(80, records, {})))
    for i, fields in enumerate(texts):
        shown = {
            name: text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            for name, text in fields.items()
        }
        assert found["answers"][i]["generation"] == shown["generation"]
        assert found["prompts"][i]["reference"] == (shown["reference"] or None)
        assert found["prompts"][i]["prompt_text"] == (shown["prompt_text"] or f"<|user|>question {i}")


NUMBERS = st.none() | st.floats() | st.integers(0, 1)
RECORDS = st.lists(
    st.builds(
        record,
        index=st.integers(0, 2),
        row=st.none() | st.integers(0, 3),
        generation=TEXTS,
        scores=st.dictionaries(TEXTS, NUMBERS, max_size=2),
        score_texts=st.dictionaries(TEXTS, TEXTS, max_size=1),
        params=st.dictionaries(TEXTS, TEXTS | NUMBERS | st.lists(TEXTS, max_size=2), max_size=2),
        verified=st.none() | st.booleans(),
        **dict.fromkeys(("reference", "origin", "data_source", "file", "ground_truth"), st.none() | TEXTS),
    ),
    max_size=3,
)


@given(RECORDS, RECORDS, st.dictionaries(TEXTS, NUMBERS, max_size=2))
def test_a_round_on_the_page_is_the_same_from_its_file(records, later, numbers):
    """Even where its file was written again, such that later ones can be loaded with it."""
    rewritten = with_types(records, missing_types(types_in(records), types_in(later)))
    for written in (records, rewritten):
        lines = _lines(written).encode("utf-8", errors="backslashreplace").decode("utf-8").split("\n")
        read = [json.loads(line) for line in lines if line]
        assert to_json(step_payload(80, read, numbers)) == to_json(step_payload(80, records, numbers))


def test_the_index_names_run_steps_and_the_best():
    entry = run_entry("demo", "checkpoints/generations", [60, 30], "exact", "max", (0.5, 30))
    assert index_payload([entry]) == {
        "format": 1,
        "runs": [
            {
                "name": "demo", "folder": "checkpoints/generations", "steps": [30, 60], "best_metric": "exact",
                "best_mode": "max", "best": {"value": 0.5, "step": 30},
            }
        ],
    }  # fmt: skip
    assert run_entry("demo", "x", [], "", "max", (0.5, 30))["best"] is None
