"""Tiny configurations of every architecture that the installed transformers has for causal language models.

A configuration class is asked for its fields, and those that `SIZES` knows get a small value; `EXCEPTIONS` has what an
architecture needs beyond that. This module knows neither weights nor this package.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo.exceptions import EXCEPTIONS, NOT_MODELS
from zoo.variants import VARIANTS, Variant

VOCAB_SIZE = 96
EOS, PAD, BOS = 1, 0, 2
HIDDEN_SIZE, NUM_HEADS, HEAD_DIM, INTERMEDIATE_SIZE = 64, 4, 16, 96

_NAMES_BY_SIZE = (
    (VOCAB_SIZE, "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size"),
    (HIDDEN_SIZE, "hidden_size d_model n_embd embedding_size embedding_dim emb_dim word_embed_proj_dim lru_width"
    " attention_hidden_size input_embedding_size output_embedding_size"),
    (INTERMEDIATE_SIZE, "intermediate_size moe_intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim n_inner"
    " d_inner dim_ff dff shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp"
    " feed_forward_size shared_intermediate_size moe_shared_expert_intermediate_size"),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_target_positions context_length"
    " sliding_window attention_chunk_size local_attention window_size attention_window_size keep_window_size"
    " max_source_positions mem_len floor_scale"),
    (4, "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_encoder_layers"
    " num_decoder_layers num_blocks max_window_layers depth"
    " num_attention_heads num_heads n_head n_heads attention_heads decoder_attention_heads encoder_attention_heads"
    " num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads index_n_heads"
    " num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num laurel_rank"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok moe_k moe_topk top_k linear_num_key_heads"),
    (HEAD_DIM, "head_dim dim_head kv_channels attention_head_dim d_head attention_head_size qk_nope_head_dim v_head_dim"
    " q_lora_rank kv_lora_rank linear_key_head_dim linear_value_head_dim global_head_dim query_pre_attn_scalar"
    " hidden_size_per_layer_input mamba_d_state ssm_state_size index_head_dim o_lora_rank mamba_dt_rank time_step_rank"
    " mamba_head_dim image_size qk_head_dim"),
    (64, "chunk_size mamba_chunk_size index_topk block_size"),
    (8, "qk_rope_head_dim rotary_dim state_size patch_size num_position_embeddings"),
)  # fmt: skip

SIZES = {name: size for size, names in _NAMES_BY_SIZE for name in names.split()}
"""Field -> the most that it may be."""

_SET_WITHOUT_DEFAULT = {"num_key_value_heads"}
"""Fields that are set even where their default is None: in most models queries share keys and values."""

_TAKEN_AS_KEYWORDS = {
    "rope_scaling", "partial_rotary_factor", "rope_theta", "tie_word_embeddings", "original_max_position_embeddings",
}  # fmt: skip
"""Fields that classes take although their signature does not name them."""

_PARTS_AS_THEY_ARE = {"DbrxConfig"}
"""Classes whose parts take no more than their own fields, as a dictionary: `EXCEPTIONS` has them."""

SPECIAL_IDS = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": BOS}


def architectures() -> list[str]:
    """The model types that have a causal language model in the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def names() -> list[str]:
    """All animals of the zoo: architectures, and the variants of those that are there, as "llama:yarn"."""
    known = architectures()
    return sorted([*known, *(name for name in VARIANTS if name.partition(":")[0] in known)])


def variant(name: str) -> Variant:
    """What distinguishes a variant; nothing for an architecture as it is."""
    return VARIANTS.get(name, Variant({}))


def configuration(name: str) -> PretrainedConfig:
    """Builds the tiny configuration of an architecture or a variant.

    Raises:
        LookupError: It cannot be built; the message says why.
        Exception: Whatever the class raises.
    """
    model_type = name.partition(":")[0]
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise LookupError(f"not in transformers {transformers.__version__}")
    if model_type in NOT_MODELS:
        raise LookupError(NOT_MODELS[model_type])
    changes = {**EXCEPTIONS.get(model_type, {}), **variant(name).fields}
    config = shrunk(CONFIG_MAPPING[model_type], changes)
    for part in (config, config.get_text_config()):
        for field, value in SPECIAL_IDS.items():
            if getattr(part, field, None) is not None:
                setattr(part, field, value)
        if hasattr(part, "is_decoder"):
            part.is_decoder = True
    if hasattr(config, "is_encoder_decoder"):
        config.is_encoder_decoder = False
    return config


def shrunk(cls: type[PretrainedConfig], changes: Mapping[str, Any]) -> PretrainedConfig:
    """Builds the tiny configuration of a class.

    Args:
        changes: Fields in place of the small ones, those of a part as "text_config.hidden_size".
    """
    return _shrunk(cls, _nested(changes))


def _shrunk(cls: type[PretrainedConfig], changes: Mapping[str, Any]) -> PretrainedConfig:
    """Builds a configuration with small sizes, its parts too.

    Args:
        changes: Fields in place of the small ones; those of a part as a dictionary.
    """
    parameters = inspect.signature(cls.__init__).parameters
    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        default = parameter.default
        is_number = isinstance(default, int) and not isinstance(default, bool)
        if name in SIZES and (is_number or name in _SET_WITHOUT_DEFAULT):
            fields[name] = min(default, SIZES[name]) if is_number else SIZES[name]
        elif name in SPECIAL_IDS and is_number:
            fields[name] = SPECIAL_IDS[name]
        elif name.endswith(("_token_id", "_token_index")) and is_number:
            fields[name] = VOCAB_SIZE - 1  # images and sounds, of which there are none
    for part in cls.sub_configs:
        own = changes.get(part, {})
        if cls.__name__ in _PARTS_AS_THEY_ARE:
            known = inspect.signature(cls.sub_configs[part].__init__).parameters
            fields[part] = {name: value for name, value in own.items() if name in known.keys() | _TAKEN_AS_KEYWORDS}
        elif part in parameters:
            part_class = _part_class(cls, part, own)
            if part_class is not None:
                fields[part] = _shrunk(part_class, own).to_dict()
    fields |= {
        name: value
        for name, value in changes.items()
        if name not in fields.keys() & cls.sub_configs.keys() and name in parameters.keys() | _TAKEN_AS_KEYWORDS
    }
    return cls(**fields)


def _part_class(cls: type[PretrainedConfig], part: str, changes: Mapping[str, Any]) -> type[PretrainedConfig] | None:
    """The class of a part of a configuration, None for a part that is missing by default."""
    if "model_type" in changes:
        return CONFIG_MAPPING[changes["model_type"]]
    part_class = cls.sub_configs[part]
    if part_class.__name__ != "AutoConfig":
        return part_class
    default = getattr(cls(), part, None)
    return None if default is None else type(default)


def _nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Turns "text_config.hidden_size" into dictionaries."""
    result: dict[str, Any] = {}
    for name, value in changes.items():
        *parts, field = name.split(".")
        inner = result
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[field] = value
    return result
