"""The architectures that people train, on CUDA: fused modules and a captured graph, against their own forward pass.

Tiny models with random weights. What is answered in Hugging Face's loop is right as well; `CAPTURED` names those that
must not end there.
"""

from __future__ import annotations

import copy
import gc
import logging
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

from verl_valgen.backends.base import Limits
from verl_valgen.backends.fast import cuda_graph
from verl_valgen.backends.fast.backend import FastBackend
from verl_valgen.backends.judging import objection, shortfalls, tolerance
from verl_valgen.hosts.base import has_experts
from verl_valgen.records import Request
from verl_valgen.rounds.restore import preserved_blas_workspaces

CUDA = torch.device("cuda", 0)
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
HEADS = {"head_dim": 16}
WINDOW = HEADS | {"sliding_window": 128}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LINEAR = HEADS | {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
# Configuration class and fields beside `SMALL`.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", HEADS),
    "qwen3_moe": ("Qwen3MoeConfig", HEADS | EXPERTS | {"num_experts": 4}),
    "qwen3_5": ("Qwen3_5TextConfig", LINEAR),
    "gemma2": ("Gemma2Config", WINDOW | {"query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", WINDOW | {"query_pre_attn_scalar": 16}),
    "gemma4": (
        "Gemma4TextConfig",
        WINDOW | {"global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 128}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo3": ("Olmo3Config", {"sliding_window": 128}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "cohere2": ("Cohere2Config", {"sliding_window": 128}),
    "phi3": ("Phi3Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 0, 1]}),
    "glm4_moe": (
        "Glm4MoeConfig",
        HEADS | EXPERTS | {"partial_rotary_factor": 0.5, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        EXPERTS
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
           "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
           "num_key_value_heads": 4},
    ),
    "falcon_h1": (
        "FalconH1Config",
        HEADS | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8},
    ),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}),
}  # fmt: skip
CAPTURED = ("llama", "qwen2", "qwen3", "gemma3", "mistral", "olmo3", "granite", "cohere2", "phi3", "smollm3")
PROMPT_LENGTHS = (3, 40, 17, 17, 90)
PARAMETERS = (
    {"do_sample": False, "max_new_tokens": 24},
    {"do_sample": True, "temperature": 1.5, "max_new_tokens": 24},
)
"""Of every other request: some of these models repeat a token where they are greedy, which shows little."""


def build(name: str, dtype: torch.dtype) -> Any:
    config_name, fields = ARCHITECTURES[name]
    if not hasattr(transformers, config_name):
        pytest.skip(f"transformers {transformers.__version__} has no {config_name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(getattr(transformers, config_name)(**(SMALL | fields)))
        for parameter in model.parameters():
            if parameter.dim() < 2:  # a norm's turn signs, else a token is its own best follower with tied embeddings
                parameter.data += torch.randn_like(parameter) * 0.1
                offset = 1 if parameter.abs().max() < 0.6 else 0  # some classes count from 1
                parameter.data[::2] = -parameter.data[::2] - 2 * offset
            else:
                parameter.data = torch.randn_like(parameter) * 1.2 / parameter.shape[-1] ** 0.5
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return model.to(device=CUDA, dtype=dtype).eval().requires_grad_(False)


def read(model: Any, request: Request, output_ids: list[int]) -> torch.Tensor:
    """How far each chosen token is from what the model's forward pass would choose, see `judging.shortfalls`."""
    ids = torch.tensor([request.input_ids + output_ids[:-1]], device=CUDA)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(request.input_ids) - 1 :]  # (T, V)
    return shortfalls(logits, request, output_ids, 0, LogitsProcessorList())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_says_what_its_forward_pass_says(name, dtype, monkeypatch, caplog):
    captured: list[str] = []
    capture = cuda_graph.CudaGraph._capture
    monkeypatch.setattr(cuda_graph.CudaGraph, "_capture", lambda self: (capture(self), captured.append(name))[0])
    reader = build(name, dtype)
    model = copy.deepcopy(reader)
    generator = torch.Generator().manual_seed(3)
    requests = [
        Request(torch.randint(3, 290, (length,), generator=generator).tolist(), (row, 0), PARAMETERS[row % 2])
        for row, length in enumerate(PROMPT_LENGTHS)
    ]
    with caplog.at_level(logging.DEBUG, "verl_valgen"), preserved_blas_workspaces(CUDA):
        answers = FastBackend(model, None, 0, Limits(batch_size=3)).generate(requests)
    away = [read(reader, one, done.output_ids) for one, done in zip(requests, answers, strict=True)]
    fused = sum("replaced" in vars(module) for module in model.modules())
    fell_back = sorted({line.split("loop: ")[1] for line in caplog.messages if "Hugging Face's loop: " in line})
    print(
        name, dtype, f"{len(captured)} captures, {fused} fused, farthest {torch.cat(away).max().item():.2g}", *fell_back
    )
    assert len({token for one in answers for token in one.output_ids}) > 5
    expected = tolerance((dtype, dtype), has_experts(reader))
    assert [objection(of_answer, expected) for of_answer in away] == [None] * len(answers)
    if name in CAPTURED:
        assert (bool(captured), fell_back) == (True, [])
        assert fused > 0
    gc.collect()
