"""What ends an answer, and what is said of it at the start of a run."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import assets
import pytest
from transformers import AutoModelForCausalLM, GenerationConfig
from unit.prompts.data import needs_sft_dataset, single_turn
from unit.prompts.templates import FAMILIES, tokenizer_of

from verl_valgen.backends.hf import HFBackend
from verl_valgen.records import Completion, Request
from verl_valgen.rounds.wording import Wording
from verl_valgen.settings.load import GenerationSettings

TURNS = "{% for m in messages %}{{ m.content }}END{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    assets.write_model(directory, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    made = AutoModelForCausalLM.from_pretrained(directory)
    made.resize_token_embeddings(128)
    return made


def host_of(model, tokenizer, generation_config, val_dataset=None):
    """As much of a host as matters here."""
    return SimpleNamespace(
        tokenizer=tokenizer,
        generation_config=generation_config,
        model_config=model.config,
        val_dataset=val_dataset,
        chat_template_kwargs={},
    )


def wording_of(model, tokenizer, generation_config, val_dataset=None, **settings):
    made = GenerationSettings(enabled=True, **settings)
    return Wording(host_of(model, tokenizer, generation_config, val_dataset), made)


@pytest.fixture
def chatml(tokenizer):
    """A base model's: its own end is that of a document, and its template ends turns with another token."""
    return tokenizer_of(FAMILIES["Qwen3"], tokenizer)


def base_config(tokenizer):
    return GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"))


def say(model, wording, tokenizer, token, **params):
    """The answer of a model that says nothing but `token`."""
    own, model.generation_config = model.generation_config, wording.special_tokens()
    bias = [[[tokenizer.convert_tokens_to_ids(token)], 1e4]]
    params = {"do_sample": False, "max_new_tokens": 3, "sequence_bias": bias} | params
    (completion,) = HFBackend(model, tokenizer, 0).generate([Request([5, 6], (0, 0), params)])
    model.generation_config = own
    return completion


def test_an_answer_of_a_base_model_ends_where_its_template_ends_turns(model, chatml):
    wording = wording_of(model, chatml, base_config(chatml))
    end, document = (chatml.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert wording.special_tokens().eos_token_id == [document, end]
    for token in (end, document):
        spoken = say(model, wording, chatml, chatml.convert_ids_to_tokens(token))
        assert spoken == Completion([token], "eos")
        assert wording.reader.answer([5], spoken).generation == ""
    ((level, line),) = wording.notes()
    assert level == logging.INFO
    assert line == (
        "answers end with <|im_end|>, too, as what is trained does; the model's own configuration names "
        "<|endoftext|> alone"
    )


def test_the_end_that_is_set_stays_alone(model, chatml):
    other = chatml.convert_tokens_to_ids("a")
    wording = wording_of(model, chatml, base_config(chatml), extra={"eos_token_id": other})
    assert list(wording.notes()) == []
    spoken = say(model, wording, chatml, "<|im_end|>", eos_token_id=other)
    assert spoken.finish_reason == "length"
    assert wording.reader.answer([5], spoken) == ("", "<|im_end|>" * 3, None)


@pytest.mark.parametrize("name", ["GLM", "Mistral"])
def test_where_the_template_adds_nothing_all_is_as_before(model, tokenizer, name):
    made = tokenizer_of(FAMILIES[name], tokenizer)
    own = GenerationConfig(eos_token_id=made.convert_tokens_to_ids(["</s>", "a"]), pad_token_id=1)
    wording = wording_of(model, made, own)
    assert (wording.special_tokens().eos_token_id, wording.special_tokens().pad_token_id) == (own.eos_token_id, 1)
    assert list(wording.notes()) == []


@pytest.mark.parametrize("settings", [{}, {"extra": {"stop_strings": ["### End"]}}])
def test_an_end_of_several_tokens_names_stop_strings(model, tokenizer, settings):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TURNS.replace("END", "### End\n")
    wording = wording_of(model, made, None, **settings)
    assert wording.special_tokens().eos_token_id == made.eos_token_id
    notes = list(wording.notes())
    if settings:
        assert notes == []
    else:
        ((level, line),) = notes
        assert level == logging.WARNING
        assert "ends a turn with '### End', which is no special token" in line
        assert "generation.stop_strings" in line


def test_an_end_of_several_tokens_among_which_is_the_models_own(model, tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TURNS.replace("END", "<|im_start|><|im_end|>")
    assert list(wording_of(model, made, None).notes()) == []


def test_a_token_that_the_model_has_no_embedding_for_ends_nothing(model, tokenizer):
    made = copy.deepcopy(tokenizer)
    made.add_tokens([f"<{i}>" for i in range(60)])
    made.chat_template = TURNS.replace("END", "<59>")
    assert made.convert_tokens_to_ids("<59>") >= 128
    assert wording_of(model, made, None).special_tokens().eos_token_id == made.eos_token_id


def test_without_a_template_all_is_as_before(model, tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = None
    wording = wording_of(model, made, None, reasoning="strip", reasoning_end="##")
    assert wording.special_tokens().eos_token_id == made.eos_token_id
    assert wording.reader.reasoning_end == "##"
    assert list(wording.notes()) == []


@needs_sft_dataset
def test_verls_single_turns_end_in_the_tokenizers_own_end(tmp_path, model, tokenizer):
    dataset = single_turn(tmp_path, tokenizer)
    own = GenerationConfig(eos_token_id=5)
    wording = wording_of(model, tokenizer, own, dataset)
    assert wording.special_tokens().eos_token_id == [5, tokenizer.eos_token_id]


def test_padding_that_only_stands_in_is_no_end(model, tokenizer):
    """Where there is no padding token, one that is ordinary text may serve."""
    made = copy.deepcopy(tokenizer)
    made.pad_token = None
    wording = wording_of(model, made, GenerationConfig(eos_token_id=[7, 8]))
    assert wording.special_tokens().pad_token_id == 7
    made.eos_token = made.chat_template = None
    wording = wording_of(model, made, GenerationConfig())
    assert wording.special_tokens().pad_token_id == 0
    assert wording.reader.decoder.whole([0]) == wording.reader.decoder.answer([0])


def test_the_end_of_reasoning_is_the_templates_or_the_one_that_is_set(model, chatml):
    config = base_config(chatml)
    assert wording_of(model, chatml, config).reader.reasoning_end == ""
    assert wording_of(model, chatml, config, reasoning="strip").reader.reasoning_end == "</think>"
    own = wording_of(model, chatml, config, reasoning="strip", reasoning_end="##")
    assert own.reader.reasoning_end == "##"


def test_no_end_of_reasoning_is_said(model, tokenizer):
    made = tokenizer_of(FAMILIES["Llama 3.1"], tokenizer)
    wording = wording_of(model, made, GenerationConfig(eos_token_id=made.convert_tokens_to_ids("<|eot_id|>")))
    assert list(wording.notes()) == []
    wording.settings = GenerationSettings(enabled=True, reasoning="strip")
    ((level, line),) = wording.notes()
    assert (level, wording.reader.reasoning_end) == (logging.WARNING, "")
    assert "set generation.reasoning_end" in line


def test_a_configuration_that_names_ordinary_tokens_costs_no_text(model, tokenizer):
    """Without a generation_config.json a class's own ids stand there, whatever they are in the vocabulary."""
    letter, *_ = tokenizer("a", add_special_tokens=False)["input_ids"]
    wording = wording_of(
        model, tokenizer, GenerationConfig(pad_token_id=letter, bos_token_id=letter, eos_token_id=None)
    )
    said = tokenizer("banana", add_special_tokens=False)["input_ids"]
    assert wording.reader.answer([], Completion(said, "length")).generation == "banana"
