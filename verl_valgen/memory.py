"""How much memory a round may take and will take, in bytes. Nothing here is collective."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from verl_valgen.backends.batching import most_new_tokens
from verl_valgen.samples import Request


def free_bytes(device: torch.device) -> float:
    """What this process can still allocate on a device; told of CUDA alone, elsewhere without limit."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def sequence_bytes(config: Any, prompt_length: int, max_new_tokens: int, dtype: torch.dtype) -> int:
    """An estimate, on the large side, of what one sequence takes while it is answered.

    Keys and values, the widest activations of the prompt's forward pass, and what logits processors make of the logits.

    Args:
        config: transformers' configuration of the text model.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * num_key_value_heads * head_dim * (prompt_length + max_new_tokens)
    intermediate_size = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    activations = prompt_length * (6 * config.hidden_size + 3 * intermediate_size)
    # A sort in float32 with its int64 indices, once more for what it gives, and a handful of temporary tensors.
    logits = 48 * config.vocab_size
    return (cache + activations) * dtype.itemsize + logits


def largest_sequence_bytes(requests: Sequence[Request], config: Any, dtype: torch.dtype) -> int:
    """`sequence_bytes` of the request that takes the most, all of its beams together; 0 of none."""
    return max(
        (
            sequence_bytes(config, len(request.input_ids), most_new_tokens(request, config), dtype)
            * request.params.get("num_beams", 1)
            for request in requests
        ),
        default=0,
    )


def logprobs_bytes(requests: Sequence[Request], config: Any, dtype: torch.dtype) -> int:
    """What it takes to say how likely an answer is, of the request that takes the most; 0 where none asks for it.

    The logits of all its tokens, and in float32 three times those of the new ones.
    """
    return max(
        (
            config.vocab_size * (len(request.input_ids) * dtype.itemsize + most_new_tokens(request, config) * 12)
            for request in requests
            if request.wants_logprob
        ),
        default=0,
    )


@contextmanager
def preserved_blas_workspaces(device: torch.device) -> Iterator[None]:
    """Frees, at the end, the workspaces that cuBLAS was given for streams of ours.

    PyTorch keeps one for every stream and thread for good. There is no other way than to drop all; the current stream
    gets its own back at once, if it had one, and that of autograd's thread comes back with its next matrix product.
    """
    if device.type != "cuda":
        yield
        return
    with_workspace = torch.cuda.memory_allocated(device)
    torch._C._cuda_clearCublasWorkspaces()
    had_workspace = torch.cuda.memory_allocated(device) < with_workspace
    if had_workspace:
        torch.cuda.current_blas_handle()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
        if had_workspace:
            torch.cuda.current_blas_handle()
