"""Architectures with other options: windows, rotary types, biases, attention, adapters. "llama:yarn" has YaRN.

Windows, chunks and original contexts are of 8 to 16 tokens: prompts and answers lie below, across and above them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """What distinguishes a variant from its architecture."""

    fields: Mapping[str, Any]
    """Of the configuration."""
    attention: str | None = None
    """The attention that it is trained with, None for transformers' choice."""
    adapter: Mapping[str, Any] | None = None
    """The fields of PEFT's `LoraConfig`, None without adapters."""


_MIXED = ["sliding_attention", "full_attention"] * 2
_WINDOW = {"sliding_window": 8}
_LONGROPE = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)],
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

VARIANTS: dict[str, Variant] = {
    "bamba:chunks": Variant({"mamba_chunk_size": 8}),
    "big_bird:full": Variant({"attention_type": "original_full"}),
    "cohere2:window": Variant({**_WINDOW, "layer_types": _MIXED}),
    "cohere:qk-norm": Variant({"use_qk_norm": True}),
    "deepseek_v3:no-query-lora": Variant({"q_lora_rank": None}),
    "deepseek_v3:yarn": Variant({"rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "diffllama:eager": Variant({}, attention="eager"),
    "doge:eager": Variant({}, attention="eager"),
    "doge:moe": Variant({"is_moe": True}),
    "exaone4:window": Variant({**_WINDOW, "layer_types": _MIXED}),
    "falcon:alibi": Variant({"alibi": True}),
    "falcon:new": Variant({"new_decoder_architecture": True}),
    "falcon:sequential": Variant({"parallel_attn": False}),
    "falcon_h1:chunks": Variant({"mamba_chunk_size": 8}),
    "gemma2:eager": Variant({"attn_logit_softcapping": 1.0}, attention="eager"),
    "gemma2:window": Variant(_WINDOW),
    "gemma3:window": Variant({"text_config.sliding_window": 8, "text_config.layer_types": _MIXED}),
    "gemma3_text:window": Variant({**_WINDOW, "layer_types": _MIXED}),
    "gemma4_text:equal-keys": Variant({"attention_k_eq_v": True, "num_global_key_value_heads": 2}),
    "gemma4_text:moe": Variant(
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    ),
    "gemma4_text:shared-keys": Variant({"num_kv_shared_layers": 2}),
    "gemma4_text:window": Variant(_WINDOW),
    "glm4_moe:qk-norm": Variant({"use_qk_norm": True}),
    "glm_moe_dsa:eager": Variant({}, attention="eager"),
    "gpt_bigcode:many-keys": Variant({"multi_query": False}),
    "gpt_neo:window": Variant({"window_size": 8}),
    "gpt_neox:sequential": Variant({"use_parallel_residual": False}),
    "gpt_oss:window": Variant(_WINDOW),
    "granite:multipliers": Variant(
        {"embedding_multiplier": 2.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25}
    ),
    "granitemoehybrid:rope": Variant({"position_embedding_type": "rope"}),
    "llama4_text:chunks": Variant({"attention_chunk_size": 8}),
    "llama4_text:no-rope": Variant({"no_rope_layers": [0, 1, 0, 1]}),
    "llama:biases": Variant({"attention_bias": True, "mlp_bias": True}),
    "llama:dynamic": Variant({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama:eager": Variant({}, attention="eager"),
    "llama:linear": Variant({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama:llama3": Variant({"rope_scaling": _LLAMA_3}),
    "llama:longrope": Variant(
        {"rope_scaling": {"rope_type": "longrope", **_LONGROPE, "factor": 8.0, "original_max_position_embeddings": 16}}
    ),
    "llama:lora": Variant({}, adapter={"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama:lora-bias": Variant({}, adapter={"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "llama:one-key": Variant({"num_key_value_heads": 1}),
    "llama:tied": Variant({"tie_word_embeddings": True}),
    "llama:wide-heads": Variant({"head_dim": 32}),
    "llama:yarn": Variant({"rope_scaling": _YARN}),
    "mamba2:chunks": Variant({"chunk_size": 8}),
    "minimax:blocks": Variant({"block_size": 8}),
    "ministral:window": Variant({**_WINDOW, "layer_types": _MIXED}),
    "mistral:window": Variant(_WINDOW),
    "mixtral:window": Variant(_WINDOW),
    "modernbert-decoder:window": Variant({"local_attention": 8}),
    "nemotron_h:chunks": Variant({"chunk_size": 8}),
    "olmo3:window": Variant(_WINDOW),
    "olmo:clip": Variant({"clip_qkv": 0.5}),
    "olmoe:clip": Variant({"clip_qkv": 0.5}),
    "opt:post-norm": Variant({"do_layer_norm_before": False}),
    "opt:projected": Variant({"word_embed_proj_dim": 32}),
    "phi3:longrope": Variant(
        {"rope_scaling": {"type": "longrope", **_LONGROPE}, "original_max_position_embeddings": 16}
    ),
    "phi3:partial": Variant({"partial_rotary_factor": 0.5}),
    "phi3:window": Variant(_WINDOW),
    "phi:qk-norm": Variant({"qk_layernorm": True}),
    "phimoe:longrope": Variant(
        {
            "rope_scaling": {
                "rope_type": "longrope",
                **_LONGROPE,
                "short_mscale": 1.1,
                "long_mscale": 1.3,
                "original_max_position_embeddings": 16,
            }
        }
    ),
    "qwen2:tied": Variant({"tie_word_embeddings": True}),
    "qwen2:tied-lora-head": Variant({"tie_word_embeddings": True}, adapter={"target_modules": ["q_proj", "lm_head"]}),
    "qwen2:tied-lora-tokens": Variant(
        {"tie_word_embeddings": True}, adapter={"target_modules": ["q_proj"], "trainable_token_indices": [5, 9, 40]}
    ),
    "qwen2:window": Variant({**_WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen2_moe:dense": Variant({"mlp_only_layers": [0]}),
    "qwen3:window": Variant({**_WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen3_moe:dense": Variant({"mlp_only_layers": [1], "decoder_sparse_step": 2}),
    "qwen3_moe:lora-experts": Variant(
        {},
        adapter={
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "recurrent_gemma:window": Variant({"attention_window_size": 8}),
    "smollm3:no-rope-first": Variant({"no_rope_layers": [0, 1, 1, 0]}),
    "smollm3:window": Variant(
        {**_WINDOW, "use_sliding_window": True, "layer_types": _MIXED, "no_rope_layers": [1, 0, 1, 1]}
    ),
    "stablelm:parallel": Variant({"use_parallel_residual": True}),
    "stablelm:qk-norm": Variant({"qk_layernorm": True}),
    "starcoder2:window": Variant(_WINDOW),
    "zamba2:chunks": Variant({"chunk_size": 8}),
}
"""Name -> variant. One whose architecture the installed transformers does not have is left out."""
