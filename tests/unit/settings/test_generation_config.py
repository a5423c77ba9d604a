"""The fields of transformers' GenerationConfig: the ones that are refused, and the ones that do not go together."""

from __future__ import annotations

import pytest
from unit.settings.loading import load, message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("custom_generate", "it would load or run code from outside this run"),
        ("trust_remote_code", "it would load or run code from outside this run"),
        ("assistant_model", "it would load or run code from outside this run"),
        ("logits_processor", "it would load or run code from outside this run"),
        ("num_return_sequences", "set generation.n"),
        ("return_dict_in_generate", "only the generated text is kept"),
        ("output_scores", "only the generated text is kept"),
        ("penalty_alpha", "it belongs to a generation mode whose code transformers loads from the hub"),
        ("num_beam_groups", "it belongs to a generation mode whose code transformers loads from the hub"),
        ("diversity_penalty", "it belongs to a generation mode whose code transformers loads from the hub"),
        ("constraints", "it belongs to a generation mode whose code transformers loads from the hub"),
        ("force_words_ids", "it belongs to a generation mode whose code transformers loads from the hub"),
        ("dola_layers", "it belongs to a generation mode whose code transformers loads from the hub"),
        ("prompt_lookup_num_tokens", "assisted decoding cannot answer prompts in batches"),
        ("num_assistant_tokens", "assisted decoding cannot answer prompts in batches"),
        ("compile_config", "it is the backend that decides about compilation"),
        ("max_length", "it counts the prompt too; set generation.max_new_tokens"),
    ],
)
def test_refused(name, reason):
    assert message({name: None}) == f"generation.{name} is not supported: {reason}"


def test_a_mode_that_moved_to_the_hub(monkeypatch):
    from transformers.generation import utils

    if not hasattr(utils, "GENERATION_MODES_MAPPING"):
        pytest.skip("this transformers keeps all modes to itself")
    moved = dict.fromkeys(utils.GENERATION_MODES_MAPPING, "somebody/beam-search")
    monkeypatch.setattr(utils, "GENERATION_MODES_MAPPING", moved)
    assert "select beam_search, but" in message({"num_beams": 2, "do_sample": False})
    monkeypatch.delattr(utils, "GENERATION_MODES_MAPPING")
    assert load({"num_beams": 2, "do_sample": False}).extra == {"num_beams": 2}
