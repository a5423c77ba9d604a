"""What the logging rank reads, says and keeps before the first round."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import GenerationConfig, Qwen2Config
from unit.prompts.data import Items, multi_turn, talk
from unit.prompts.templates import FAMILIES, tokenizer_of

from verl_valgen.hosts.schedule import Schedule
from verl_valgen.prompts.files import OwnPrompt
from verl_valgen.records import RowData
from verl_valgen.rounds.preparation import prepare
from verl_valgen.rounds.wording import Wording
from verl_valgen.settings.load import GenerationSettings
from verl_valgen.text import OnceLogger

THOUGHT = "<think>\nsum\n</think>\n\n14"


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """Prepares a run with a data set; returns the checksum of its prompts."""

    def run(dataset, start_step=0, own=(), chat_template_kwargs=None, **settings):
        host = SimpleNamespace(
            tokenizer=getattr(dataset, "tokenizer", tokenizer),
            own_tokenizer=tokenizer,
            generation_config=GenerationConfig(),
            model_config=Qwen2Config(vocab_size=len(tokenizer)),
            why_not_generating=lambda: None,
            val_dataset=dataset,
            chat_template_kwargs=chat_template_kwargs or {},
            device=torch.device("cpu"),
            config=OmegaConf.create({"trainer": {"default_local_dir": str(tmp_path), "logger": []}}),
            verl_loggers={},
            schedule=lambda: Schedule(start_step, 4, 4, 1),
            why_no_validation_batch=lambda: None,
        )
        made = GenerationSettings(enabled=True, rows="first", **settings)
        recorder, _ = prepare(host, made, own, Wording(host, made), OnceLogger(logging.getLogger("verl_valgen")))
        recorder.close()
        return recorder.run["prompts"]

    return run


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_another_strategy_asks_the_same_prompts(tmp_path, tokenizer, prepared, caplog):
    dataset = multi_turn(tmp_path, tokenizer, [talk("a?", "A"), talk("b?", "B")])
    asked = prepared(dataset)
    folder = tmp_path / "generations"
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps([{"start_step": 0, "prompts": asked}]))
    (folder / "best.json").write_text("{}")
    strategies = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True}}
    assert prepared(dataset, 2, strategies=strategies) == asked
    assert warnings_of(caplog) == []
    assert prepared(multi_turn(tmp_path, tokenizer, [talk("c?", "A")] * 2), 2) != asked
    assert [text.partition(":")[0] for text in warnings_of(caplog)] == ["the prompts are others than before"]
    assert [(folder / name / "best.json").exists() for name in (".", "old-1")] == [True, True]


@pytest.mark.parametrize(
    ("trained", "settings", "rows"),
    [
        (("14", "15", THOUGHT), {}, "rows 0, 1 train"),
        (("14", THOUGHT, THOUGHT), {}, "row 0 trains"),
        ((THOUGHT, THOUGHT, THOUGHT), {}, None),
        (("14", "15", THOUGHT), {"reasoning": "keep"}, None),
        (("14", "15", THOUGHT), {"reference": "ground_truth"}, None),
        (("14", "15", THOUGHT), {"reasoning_end": "5"}, "rows 0, 2 train"),
    ],
)
def test_rows_that_train_no_end_of_reasoning_are_named(tokenizer, prepared, caplog, trained, settings, rows):
    chatml = tokenizer_of(FAMILIES["Qwen3"], tokenizer)
    question = chatml("7+7?<|im_end|><|im_start|>assistant\n")["input_ids"]
    answers = [chatml(text)["input_ids"] for text in trained]
    dataset = Items(
        *({"input_ids": question + ids, "loss_mask": [0] * len(question) + [1] * len(ids)} for ids in answers)
    )
    dataset.tokenizer = chatml
    prepared(dataset, **{"reasoning": "strip", **settings})
    end = settings.get("reasoning_end", "</think>")
    text = f"generation.reasoning=strip: {rows} no {end}, and an answer without it counts as empty: set "
    said = [text for text in warnings_of(caplog) if "no row has a ground truth" not in text]
    assert said == ([] if rows is None else [f"{text}generation.reasoning=keep"])


def test_prompts_that_close_the_reasoning_and_own_ones_are_not_named(tokenizer, prepared, caplog):
    chatml = tokenizer_of(FAMILIES["Qwen3"], tokenizer)
    closed, answer = (chatml(text)["input_ids"] for text in ("7+7?<think>\n\n</think>\n\n", "14"))
    dataset = Items({"input_ids": closed + answer, "loss_mask": [0] * len(closed) + [1] * len(answer)})
    dataset.tokenizer = chatml
    own = [OwnPrompt(talk("7+7?"), "14", {}, RowData())]
    prepared(dataset, own=own, prompts="own.jsonl", prompts_mode="append", reasoning="strip")
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("start_step", "settings", "is_told"), [(3, {}, True), (2, {}, False), (2, {"every": 4}, True)]
)
def test_overlap_without_a_round_that_training_could_go_on_beside_is_told(
    tmp_path, tokenizer, prepared, caplog, start_step, settings, is_told
):
    caplog.set_level(logging.INFO, "verl_valgen")
    prepared(
        multi_turn(tmp_path, tokenizer, [talk("a?", "A")]), start_step, overlap=True, before_train=True, **settings
    )
    told = [record.getMessage() for record in caplog.records if "generation.overlap" in record.getMessage()]
    assert len(told) == is_told
