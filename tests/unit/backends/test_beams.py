"""The sum by which beam search has chosen: as transformers reports it, and told apart from another one."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from verl_valgen.backends.beams import BeamObserver, beam_objection
from verl_valgen.backends.hf import HFBackend
from verl_valgen.backends.padding import left_pad
from verl_valgen.records import Request

PROMPTS = [[(7 * row + 3 * i) % 90 for i in range(4 + 3 * row)] for row in range(4)]
EOS = [7, 8, 9, 10, 11, 12, 13, 14, 15]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


@pytest.mark.parametrize(
    "parameters",
    [{}, {"repetition_penalty": 1.3}, {"eos_token_id": EOS, "length_penalty": -1.0}, {"early_stopping": True}],
)
def test_sums_are_those_that_transformers_reports(model, parameters):
    eos_ids = parameters.get("eos_token_id", [])
    observer = BeamObserver(len(PROMPTS), len(eos_ids))
    input_ids, attention_mask = left_pad(PROMPTS, model.device)
    output = model.generate(
        input_ids,
        attention_mask=attention_mask,
        logits_processor=LogitsProcessorList([observer]),
        generation_config=GenerationConfig(
            num_beams=3, max_new_tokens=12, do_sample=False, pad_token_id=0, output_scores=True,
            return_dict_in_generate=True, **parameters,
        ),
    )  # fmt: skip
    answers = output.sequences[:, input_ids.shape[1] :].tolist()
    lengths = [next((i + 1 for i, token in enumerate(ids) if token in eos_ids), len(ids)) for ids in answers]
    answers = [ids[:length] for ids, length in zip(answers, lengths, strict=True)]
    penalty = parameters.get("length_penalty", 1.0)
    expected = [
        score * length**penalty for score, length in zip(output.sequences_scores.tolist(), lengths, strict=True)
    ]
    assert observer.sums(answers) == pytest.approx(expected, abs=1e-3)
    assert observer.sums([[99, *ids[1:]] for ids in answers]) == [None] * len(answers), "beams that never were"
    assert observer.sums([[]] * len(answers)) == [None] * len(answers)
    if eos_ids:
        assert min(lengths) < 12, "some end early, or this shows little"


@pytest.mark.parametrize("also", [{}, {"renormalize_logits": True, "suppress_tokens": [3, 4, 5]}])
def test_the_readers_sum_tells_other_logits_apart(model, also):
    params = {"do_sample": False, "num_beams": 3, "max_new_tokens": 12, "repetition_penalty": 1.2} | also
    requests = [Request(ids, (row, 0), params) for row, ids in enumerate(PROMPTS)]
    with torch.no_grad():
        backend = HFBackend(model, None, 0)
        for request, completion in zip(requests, backend.generate(requests), strict=True):
            ids = torch.tensor([[*request.input_ids, *completion.output_ids[:-1]]])
            logits = model(ids).logits[0, -len(completion.output_ids) :]
            arguments = (request, completion.output_ids, completion.sum_logprob, backend.logits_processors(request))
            assert beam_objection(logits, *arguments) is None
            assert beam_objection(logits.bfloat16(), *arguments) is None
            found = beam_objection(logits.roll(1, 0), *arguments)
            assert found is not None
            assert found.startswith(f"beam search adds up {completion.sum_logprob:.2f} for 12 tokens")
