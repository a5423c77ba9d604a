"""What vLLM's engine is made with: its size, its arguments, its graphs, the variables that it reads."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from verl_valgen.backends.lengths import most_positions
from verl_valgen.backends.vllm import versions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LENGTH_MULTIPLE = 64
_MOST_PROMPT_TOKENS = 8192
"""Tokens of prompts that are read in one step, at most."""
_SMALLEST_SHARE = 0.01
"""Of the device's memory, which vLLM compares with what is free before it makes anything. What it takes is said in
bytes."""


@dataclass(frozen=True)
class EngineSize:
    """What an engine is made for."""

    tensor_parallel: int
    """Number of ranks that hold the model together."""
    max_model_len: int
    """Tokens of the longest prompt with its answer."""
    max_num_seqs: int
    """Number of sequences that run at once."""
    cache_bytes: int
    """Of keys and values, on each rank's device."""

    def rounded(self, config: PretrainedConfig) -> EngineSize:
        """With room for a multiple of 64 tokens, as far as the model's context reaches."""
        length = math.ceil(self.max_model_len / _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        length = int(min(length, most_positions(config)))
        return EngineSize(self.tensor_parallel, length, self.max_num_seqs, self.cache_bytes)


def make(
    config: PretrainedConfig,
    model_class: type,
    size: EngineSize,
    dtype: torch.dtype,
    device: torch.device,
    *,
    compile: bool,
) -> Any:
    """vLLM's `LLM`, with random weights. To be called in force; collective as `Engine` is; see there.

    Raises:
        Exception: Whatever vLLM raises.
    """
    from vllm import LLM

    on_cuda = device.type == "cuda"
    num_read = max(size.max_num_seqs, min(_MOST_PROMPT_TOKENS, size.max_num_seqs * size.max_model_len))
    arguments: dict[str, Any] = {}
    if dist.is_initialized():
        arguments |= {"distributed_executor_backend": "external_launcher"}
    if on_cuda:
        arguments |= {"enable_sleep_mode": True, "compilation_config": _compilation(size.max_num_seqs, compile)}
    else:
        # Where a step reads part of a prompt, the noise of a seeded answer is taken back: not by CPU's generators.
        arguments |= {"enable_chunked_prefill": False}
        num_read = max(num_read, size.max_model_len)
    with (
        tempfile.TemporaryDirectory(prefix="verl-valgen-") as folder,
        versions.plain_cpu(),
        versions.without_bars(),
    ):
        _write_config(Path(folder), config, model_class, dtype)
        return LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype=str(dtype).removeprefix("torch."),
            seed=0,
            tensor_parallel_size=size.tensor_parallel,
            max_model_len=size.max_model_len,
            max_num_seqs=size.max_num_seqs,
            max_num_batched_tokens=num_read,
            kv_cache_memory_bytes=size.cache_bytes,
            gpu_memory_utilization=_SMALLEST_SHARE,
            enable_prefix_caching=True,
            logprobs_mode="raw_logprobs",
            enforce_eager=not on_cuda,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **arguments,
        )


def _write_config(folder: Path, config: PretrainedConfig, model_class: type, dtype: torch.dtype) -> None:
    """All that vLLM reads of a model here."""
    config = copy.deepcopy(config)
    config.architectures = [model_class.__name__]
    values = json.loads(config.to_json_string(use_diff=True))
    # vLLM has a configuration of its own where the model's comes with code: that is not run again.
    values.pop("auto_map", None)
    values.pop("torch_dtype", None)
    values["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(values))


def _compilation(max_num_seqs: int, compile: bool) -> dict[str, Any]:
    """CUDA graphs for up to so many sequences, in steps that grow: each keeps memory, and takes time when it is made.

    Without torch.compile only whole steps can be captured. Of those that read prompts vLLM could have graphs, too (the
    mode `FULL`), and then answers wrongly: after the first token with 0.25 on H100, where its older model runner runs,
    which mixtures of experts have; torchtitan met the same (pytorch/torchtitan#3709). There are few of these steps, as
    `VLLMBackend` hands prompts on in groups.
    """
    steps = [(8, 8), (64, 8), (256, 16), (max_num_seqs, 64)]
    sizes, last = [1, 2, 4], 0
    for end, step in steps:
        sizes += range(last + step, end + 1, step)
        last = max(last, end)
    sizes = sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})
    chosen: dict[str, Any] = {"cudagraph_capture_sizes": sizes, "max_cudagraph_capture_size": max_num_seqs}
    return chosen if compile else chosen | {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


def environment(size: EngineSize, device: torch.device) -> dict[str, str]:
    """The variables with which vLLM runs here, but for what the process has set on purpose."""
    required = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # there is nothing to be fetched
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    preferred = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}  # memory that does not sleep
    if find_spec("flashinfer") is None:
        preferred["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if int(os.environ.get("LOCAL_WORLD_SIZE", size.tensor_parallel)) % size.tensor_parallel == 0:
        preferred["VLLM_HOST_IP"] = "127.0.0.1"  # who holds a model together is on one host
    if dist.is_initialized():
        rank = dist.get_rank()
        local_rank = device.index if device.type == "cuda" else os.environ.get("LOCAL_RANK", rank)
        required |= {"RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size()), "LOCAL_RANK": str(local_rank)}
        preferred |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # not used: there is a group already
    return {name: value for name, value in preferred.items() if name not in os.environ} | required
