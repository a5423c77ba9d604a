"""Our way through a few given tokens, for trials: what logits it sees, and whether they are the model's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from verl_valgen.backends.fast.attention import attention_for_decoding
from verl_valgen.backends.fast.cuda_graph import CudaGraph
from verl_valgen.backends.fast.step import NOTHING, Decoder, Method
from verl_valgen.backends.trial import NUM_STEPS

_METHOD = Method(choice=None, eos_ids=(), pad_id=0)


@torch.no_grad()
def decoded_logits(
    model: PreTrainedModel, sequences: Sequence[list[int]], *, capture: bool = False, reported_length: int = 0
) -> Tensor:
    """Runs prompts and `NUM_STEPS` steps of sequences as the loop would, their last tokens standing for chosen ones.

    In the order of what happens: row 0 is given the last sequence and row 1 the long one; after a step row 0 is given
    the short one, shorter than what it held, while row 1 goes on; its prompt is read, padded on the right, together
    with one for a third row.

    Args:
        sequences: A short one, a long one, and another of at least its length.
        capture: Whether the steps from the second on are a CUDA graph, as in the loop.
        reported_length: What the cache says of its length in the steps: 0, as in the loop, or what shows who asks.

    Returns:
        (2, NUM_STEPS + 1, V) float32, of the short and the long sequence.
    """
    short, long, other = sequences
    decoder = Decoder(model, 3, math.ceil(max(map(len, sequences)) / 64) * 64, NUM_STEPS + 2)

    def step() -> Tensor:
        logits = decoder.step(_METHOD, 3, decoder.cache_length)
        assert logits is not None
        return logits

    run = CudaGraph(step) if capture and model.device.type == "cuda" else step
    decoder.cache.place.reported_length = reported_length
    logits: dict[int, list[Tensor]] = {0: [], 1: []}
    answers = {0: other[-NUM_STEPS:], 1: long[-NUM_STEPS:]}
    _begin(decoder, {0: other, 1: long})
    with_short = {0: short, 2: other}
    for number in range(NUM_STEPS + 2):
        if number == 1:
            _begin(decoder, with_short)
            answers[0] = [other[0], *short[-NUM_STEPS:]]  # what is chosen after the first step is not its own
        with attention_for_decoding(model, decoder.cache):
            seen = run()
        assert seen is not None
        for row in logits:
            logits[row].append(seen[row].clone())
        chosen = [tokens[number] if number < len(tokens) else 0 for tokens in (answers[0], answers[1], [])]
        decoder.accept(torch.tensor(chosen, device=model.device), _METHOD)
    return torch.stack([torch.stack(logits[0][1:]), torch.stack(logits[1][:-1])])


def _begin(decoder: Decoder, by_row: dict[int, list[int]]) -> None:
    """Gives rows the prompts of sequences; of a prompt of one token nothing is read."""
    prompts = {row: sequence[:-NUM_STEPS] for row, sequence in by_row.items()}
    if read := {row: prompt[:-1] for row, prompt in prompts.items() if len(prompt) > 1}:
        decoder.prefill(list(read), list(read.values()))
    if empty := [row for row in prompts if row not in read]:
        decoder.copy(empty, empty, [0] * len(empty))
    # They end with the last token whose logits are wanted: one further on could need another rotary table.
    states = [
        NOTHING._replace(tokens=prompt[-1], slots=len(prompt) - 1, limits=NUM_STEPS + 1, has_ended=0)
        for prompt in prompts.values()
    ]
    decoder.begin(list(prompts), states, None)
