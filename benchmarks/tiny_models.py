"""Tiny models of many architectures, with random weights or trained for seconds on a language of two kinds.

Trained, their distributions are peaked as those of large models are: half of the text is sums ("17+25=42;"), which
leave no choice behind "=", half a walk through a graph in which one to five tokens can follow.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

VOCAB_SIZE, FIRST_NODE = 160, 40
EOS = 1
STEPS, SEQUENCES, TOKENS, LEARNING_RATE = 150, 8, 32, 4e-3

SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
    "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 64, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64,
}  # fmt: skip
MAMBA = {
    "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16,
    "mamba_expand": 2, "mamba_chunk_size": 16,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
GEMMA = {"sliding_window": 16, "query_pre_attn_scalar": 16}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 40,
    "short_factor": [1.0] * 8, "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
}  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2, cap 1": {**GEMMA, "attn_logit_softcapping": 1.0},
    "gemma2, cap 5": {**GEMMA, "attn_logit_softcapping": 5.0},
    "gemma2, cap 50": {**GEMMA, "attn_logit_softcapping": 50.0},
    "gemma3_text": GEMMA,
    "mistral": {"sliding_window": 16},
    "olmo3": {"sliding_window": 16},
    "granite": {},
    "cohere2": {"sliding_window": 16},
    "phi3": {},
    # Its configuration has the length in a field of its own, which prevails.
    "phi3, longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40},
    "smollm3": {},
    "exaone4": {"sliding_window": 16},
    "diffllama": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "stablelm": {},
    "bloom": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt_oss": {**EXPERTS, "sliding_window": 16},
    "phimoe": EXPERTS,
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
    "glm4_moe": {**EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5},
    "falcon_h1": MAMBA,
    "lfm2": {"block_ff_dim": 128, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {**EXPERTS, **LINEAR},
    "qwen3_5_text": LINEAR,
    "mamba2": {"num_heads": 8, "state_size": 16, "n_groups": 1, "chunk_size": 16, "expand": 2},
    "rwkv": {"attention_hidden_size": 64, "context_length": 512},
}
"""Name (what stands before a comma is transformers' model type) -> fields beside `SIZES`."""

WEIGHTS = ("random", "wide", "trained")
"""As the class draws them (a standard deviation of 0.02, which leaves attention without a say), with 0.08, trained."""


def tiny_model(name: str, weights: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Builds a float32 model in eval mode on the CPU; returns it and, if it was trained, its state a step earlier."""
    config = CONFIG_MAPPING[name.partition(",")[0]](**{**SIZES, **ARCHITECTURES[name]})
    if weights == "wide":
        config.initializer_range = 0.08
    if "cap" in name:
        config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # constants in a fresh model: experts are chosen by a bias of 8 +- 0.05
        for key, values in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("e_score_correction_bias"):
                values.copy_(8 + 0.05 * torch.randn(values.shape))
    earlier = train(model) if weights == "trained" else {}
    model.eval().requires_grad_(False)
    model.generation_config = special_ids()
    return model, earlier


def special_ids() -> GenerationConfig:
    return GenerationConfig(eos_token_id=EOS, pad_token_id=0, bos_token_id=2)


def train(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Trains a model; returns its state before the last step."""
    texts = torch.tensor(language(STEPS * SEQUENCES, TOKENS, seed=1)).view(STEPS, SEQUENCES, TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    earlier: dict[str, torch.Tensor] = {}
    model.train()
    for step, batch in enumerate(texts):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / STEPS)
        logits = model(input_ids=batch, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step == STEPS - 1:
            earlier = {name: values.clone() for name, values in model.state_dict().items()}
        optimizer.step()
        optimizer.zero_grad()
    return earlier


def language(num_texts: int, num_tokens: int, seed: int) -> list[list[int]]:
    """Returns texts of `num_tokens` ids each."""
    graph_random, text_random = random.Random(5), random.Random(seed)
    nodes = range(FIRST_NODE, VOCAB_SIZE)
    followers = {node: graph_random.sample(nodes, graph_random.choice([1, 2, 2, 3, 5])) for node in nodes}
    texts = []
    for _ in range(num_texts):
        text: list[int] = []
        is_sum, node = text_random.random() < 0.5, text_random.choice(nodes)
        while len(text) < num_tokens:
            if is_sum:
                a, b = text_random.randrange(100), text_random.randrange(100)
                text += [3 + "0123456789+=;".index(character) for character in f"{a}+{b}={a + b};"]
            else:
                text.append(node)
                options = followers[node]
                node = options[min(int(text_random.expovariate(1.0)), len(options) - 1)]
        texts.append(text[:num_tokens])
    return texts
