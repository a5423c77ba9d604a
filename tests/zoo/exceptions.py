"""What an architecture needs beyond small sizes, to be built or to be itself: fields of its configuration by name.

"text_config.head_dim" is a field of a part. A field that one release's class does not have is left out there.
"""

from __future__ import annotations

from typing import Any

NOT_MODELS = {
    "gemma4_assistant": "a draft model, which reads another model's keys and values",
    "gemma4_unified_assistant": "a draft model, which reads another model's keys and values",
    "musicgen": "says codes of sound, several a step",
    "musicgen_melody": "says codes of sound, several a step",
}
"""Architectures that say no text by themselves, and why."""

_GROUPED_EXPERTS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_MLA = {"num_key_value_heads": 4, "num_experts_per_tok": 2}  # latent attention has as many keys as queries
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
_QWEN_3_5 = {"rope_parameters": _MROPE}
_QWEN_4 = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
    "indexer_compress_ratio": 4, "ple_layer_ids": [1], "eos_token_id": 1, "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64, "split_ngram_parts": 2,
}  # fmt: skip
_MIXED = ["sliding_attention", "full_attention"]

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA_2, "attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64, "encoder_config.hidden_size_global": 64,
        "decoder_config.hidden_size_global": 64, "global_config.hidden_size": 64,
    },
    "cpmant": {"prompt_length": 8, "prompt_types": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "max_seq_len": 128,
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_GROUPED_EXPERTS, **_MLA},
    "deepseek_v3": {**_GROUPED_EXPERTS, **_MLA},
    "dots1": {**_GROUPED_EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_groups": 2},
    "gemma3n_text": {
        "layer_types": _MIXED * 2, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
    },
    "gemma4": {"text_config.layer_types": _MIXED * 2, "vision_config.position_embedding_size": 16},
    "gemma4_text": {"layer_types": _MIXED * 2},
    "gemma4_unified": {
        "vision_config.mm_embed_dim": 32, "vision_config.mm_posemb_size": 16, "vision_config.output_proj_dims": 32,
    },
    "glm4_moe": {**_GROUPED_EXPERTS, "num_experts_per_tok": 2},
    "glm4_moe_lite": {**_GROUPED_EXPERTS, **_MLA},
    "glm_moe_dsa": {**_GROUPED_EXPERTS, **_MLA},
    "got_ocr2": {"vision_config.output_channels": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**_MAMBA_2, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, **_MLA},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "mllama": {
        "text_config.cross_attention_layers": [1],
        "text_config.rope_scaling": {"rope_type": "default"},
    },
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "hybrid_override_pattern": "M*-E"},
    "qwen3_5": {f"text_config.{name}": value for name, value in _QWEN_3_5.items()},
    "qwen3_5_moe": {f"text_config.{name}": value for name, value in _QWEN_3_5.items()},
    "qwen3_5_text": _QWEN_3_5,
    "qwen3_5_moe_text": _QWEN_3_5,
    "qwen4_exp": {f"text_config.{name}": value for name, value in _QWEN_4.items()},
    "qwen4_exp_text": _QWEN_4,
    "reformer": {
        "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"] * 2,
        "is_decoder": True,
    },
    "roc_bert": {
        "shape_vocab_size": 16, "pronunciation_vocab_size": 16, "shape_embed_dim": 16, "pronunciation_embed_dim": 16,
    },
    "transfo-xl": {"cutoffs": [], "d_embed": 64, "adaptive": False},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "youtu": _MLA,
    "zamba": {
        "num_hidden_layers": 7, "attn_layer_period": 2, "attn_layer_offset": 1, "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 5, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 8, "mamba_d_state": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip
