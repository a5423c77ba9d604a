"""Small models for vLLM's engine, and what transformers answers with them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from verl_valgen.backends.hf import HFBackend
from verl_valgen.backends.vllm.engine import Engine
from verl_valgen.backends.vllm.making import EngineSize
from verl_valgen.records import Completion, Request

EOS = 2
SIZE = EngineSize(tensor_parallel=1, max_model_len=100, max_num_seqs=8, cache_bytes=2**24)
CPU = torch.device("cpu")


def config(vocab_size: int, **changes: Any) -> Qwen2Config:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0}
    values = {"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True, **sizes, **ids}
    return Qwen2Config(vocab_size=vocab_size, **{**values, **changes})


def model(config: Qwen2Config, seed: int) -> PreTrainedModel:
    """With weights large enough for answers that differ; no global random state is used up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Qwen2ForCausalLM(config).eval()
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(12 if ".layers." in name else 3)
    made.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0, bos_token_id=1)
    return made


def mixture(vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """A mixture of experts, whose experts a checkpoint has one by one."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    ids = {"eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=vocab_size, **sizes, **heads, **experts, **ids)).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    made.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0, bos_token_id=1)
    return made


def weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """As the trainer's weights are streamed: tied ones once, and each tensor gone when the next one comes."""
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            sent = tensor.clone()
            yield name, sent
            sent.fill_(torch.nan)


def engine(
    config: PretrainedConfig,
    size: EngineSize = SIZE,
    *,
    model_class: type[PreTrainedModel] = Qwen2ForCausalLM,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    compile: bool = False,
) -> Engine:
    made = Engine(config, model_class, size, dtype, device, compile=compile)
    made.generation_config = GenerationConfig(eos_token_id=EOS)
    return made


def prompts(vocab_size: int, number: int = 6) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, vocab_size) for _ in range(rng.randint(5, 40))] for _ in range(number)]


def requests(prompts: Sequence[list[int]], **params: Any) -> list[Request]:
    params = {"do_sample": False, "max_new_tokens": 24, **params}
    return [Request(ids, (i, 0), params, wants_logprob=True) for i, ids in enumerate(prompts)]


def expected(model: PreTrainedModel, tokenizer: Any, requests: Sequence[Request]) -> list[Completion]:
    return HFBackend(model, tokenizer, 0).generate(requests)
