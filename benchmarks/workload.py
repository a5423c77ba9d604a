"""What the benchmarks answer: models of Qwen2.5's shapes with random weights, prompts, parameters, lengths."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "0.5B": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "7.6B": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip

PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "default": {},
    "temperature": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "top_p 0.95": {"temperature": 1.0, "top_k": 0, "top_p": 0.95},
}
"""Fields of `GenerationSettings`."""

EOS_ID = 7
MEAN_NEW_TOKENS, MOST_NEW_TOKENS = 150, 512
"""Of the answers of uneven length. They are geometric: every token ends its answer with the same probability."""

_CONSTANT = 1e5
"""Beside it, all that a model's layers add to an embedding is small."""


def config_of(size: str, **fields: Any) -> Qwen2Config:
    return Qwen2Config(**(SIZES[size] | {"use_sliding_window": False, "max_position_embeddings": 4096} | fields))


def random_model(config: Qwen2Config, device: torch.device | str, dtype: torch.dtype) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def end_after_a_geometric_number_of_tokens(model: Qwen2ForCausalLM, mean: int) -> None:
    """Makes every sampled token `EOS_ID` with the probability of 1 / (mean + 1), and all others alike.

    The first number of every hidden state is made constant, and the head gives it a weight for that token alone: a bias
    that needs no other modules than the model has. The embeddings must not be tied to the head.
    """
    config: Any = model.config
    head: nn.Parameter = model.lm_head.weight
    assert head is not model.model.embed_tokens.weight
    model.model.embed_tokens.weight[:, 0] = _CONSTANT
    head *= 0.01
    head[:, 0] = 0
    head[EOS_ID, 0] = math.log(config.vocab_size / mean) / math.sqrt(config.hidden_size)  # behind the last norm


def uneven_prompts(number: int, vocab_size: int) -> list[list[int]]:
    """Prompts of 60 to 200 tokens. The first are the same, however many there are."""
    rng = random.Random(0)
    return [[rng.randrange(100, min(vocab_size, 150000)) for _ in range(rng.randint(60, 200))] for _ in range(number)]


def even_prompts(number: int, num_tokens: int) -> list[list[int]]:
    return [[5 + (row * 37 + i) % 1000 for i in range(num_tokens)] for row in range(number)]
