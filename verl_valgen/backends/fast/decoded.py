"""Our way through a few given tokens, for trials: what logits it sees, and whether they are the model's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from verl_valgen.backends.fast.attention import attention_for_decoding
from verl_valgen.backends.fast.cuda_graph import CudaGraph
from verl_valgen.backends.fast.step import Decoder
from verl_valgen.backends.padding import left_pad
from verl_valgen.backends.trial import NUM_STEPS


@torch.no_grad()
def decoded_logits(
    model: PreTrainedModel, sequences: Sequence[list[int]], *, capture: bool = False, reported_length: int = 0
) -> Tensor:
    """Runs our prefill and `NUM_STEPS` steps over sequences, whose last tokens stand for chosen ones.

    Args:
        sequences: B of them.
        capture: Whether the steps from the second on are a CUDA graph, as in the loop.
        reported_length: What the cache says of its length in the steps: 0, as in the loop, or what shows who asks.

    Returns:
        (B, NUM_STEPS + 1, V) float32.
    """
    device = model.device
    longest = max(len(sequence) for sequence in sequences)
    decoder = Decoder(model, len(sequences), math.ceil(longest / 64) * 64)
    decoder.set_parameters(LogitsProcessorList(), GenerationConfig(pad_token_id=0))
    decoder.chooses_in_step = False
    step = CudaGraph(decoder.step) if capture and device.type == "cuda" else decoder.step
    input_ids, attention_mask = left_pad([sequence[:-NUM_STEPS] for sequence in sequences], device)
    tokens = torch.tensor([sequence[-NUM_STEPS:] for sequence in sequences], device=device)
    logits = [decoder.prefill(input_ids, attention_mask, torch.zeros_like(tokens[:, 0], dtype=torch.bool))]
    decoder.cache.set_reported_length(reported_length)
    with attention_for_decoding(model):
        for chosen in tokens.unbind(1):
            decoder.accept(chosen)
            logits.append(step().clone())
    return torch.stack(logits, dim=1)
