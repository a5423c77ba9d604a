"""Measures a gather on one GPU: seconds, memory above the level before, and the decoding that follows.

    python benchmarks/gather.py

A Qwen2 of 0.5B parameters with random weights under verl's own wrapping, one rank, bfloat16 copy; the last of three
repetitions is printed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, ShardingStrategy
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from verl_valgen.backends.hf import HFBackend
from verl_valgen.records import Request
from verl_valgen.weights.gather import gather

QWEN2_0_5B: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 128, 64
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
SAMPLING = GREEDY | {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.7}


def main() -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("nccl")
    print("strategy  lora   gather s  peak B/param  held B/param  after B  greedy ms/token  sampling ms/token")
    for strategy in ("fsdp2", "fsdp"):
        for lora in (False, True):
            model = build(lora)
            num_params = sum(parameter.numel() for parameter in model.parameters())
            wrapped = wrap(model, strategy)
            for _ in range(3):
                figures = measure(wrapped)
            seconds, peak, held, after, greedy, sampling = figures
            print(
                f"{strategy:8}  {lora!s:5}  {seconds:8.3f}  {peak / num_params:12.2f}  {held / num_params:12.2f}"
                f"  {after:7}  {greedy:15.1f}  {sampling:17.1f}",
                flush=True,
            )
            del model, wrapped
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def build(lora: bool) -> nn.Module:
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN2_0_5B))
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def wrap(model: nn.Module, strategy: str) -> nn.Module:
    """Shards the model as `FSDPSFTTrainer._build_model_optimizer` does."""
    from verl.utils.fsdp_utils import apply_fsdp2, fsdp2_load_full_state_dict, get_fsdp_wrap_policy

    mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("fsdp",))
    if strategy == "fsdp":
        return FSDP(
            model,
            auto_wrap_policy=get_fsdp_wrap_policy(model, config={}, is_lora=hasattr(model, "peft_config")),
            device_id=torch.cuda.current_device(),
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            mixed_precision=MixedPrecision(torch.bfloat16, torch.float32, torch.float32),
            device_mesh=mesh,
        )
    state = model.state_dict()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    apply_fsdp2(model, {"mesh": mesh, "mp_policy": policy, "offload_policy": None, "reshard_after_forward": True}, {})
    fsdp2_load_full_state_dict(model, state, mesh, None)
    return model


def measure(wrapped: nn.Module) -> tuple[float, int, int, int, float, float]:
    """Gathers, and decodes greedily and with sampling.

    Returns:
        Seconds of the gather; bytes above the level before at its peak, with the copy, and without it again; ms per
        token step of both decodings.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds, model = timed(lambda: gather(wrapped, dtype=torch.bfloat16, device=device, keep=True))
    peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    ms_per_token = []
    for params in (GREEDY, SAMPLING):
        backend = HFBackend(model, None, seed=0)  # type: ignore[arg-type]  # no stop strings, no tokenizer
        requests = [Request(list(range(5, 5 + PROMPT_TOKENS)), (row, 0), params) for row in range(NUM_PROMPTS)]
        generate = partial(backend.generate, requests)
        ms_per_token.append(timed(generate)[0] / NEW_TOKENS * 1e3)
    del model, backend, generate
    return seconds, peak, held, torch.cuda.memory_allocated() - before, *ms_per_token


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
