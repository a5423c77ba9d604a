"""What ranks tell each other. Everything here is collective: all ranks must call.

A rank's failure is a value that is exchanged, never an exception that leaves others waiting. Values travel as JSON in
tensors: nothing is unpickled. On one rank, and without a process group, nothing is sent.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def agree(ok: bool, device: torch.device) -> bool:
    """Whether all ranks are ok. Collective: all ranks must call."""
    return smallest(float(ok), device) > 0


def smallest(value: float, device: torch.device) -> float:
    """The least value of all ranks, in float64. Collective: all ranks must call."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor.item()


def largest(value: float, device: torch.device) -> float:
    """Collective: all ranks must call."""
    return -smallest(-value, device)


def broadcast(value: Any, is_source: bool, device: torch.device) -> Any:
    """What JSON makes of the source's value (a tuple becomes a list). Collective: all ranks must call.

    Args:
        value: Of the one rank that is the source; whatever the others pass is not looked at.

    Raises:
        Exception: On the source, where its value cannot be sent, after the last collective; the others get None.
    """
    if world_size() == 1:
        return json.loads(json.dumps(value))
    data, error = _encoded(value) if is_source else (_NOTHING, None)
    buffer = torch.zeros(int(largest(len(data), device)), dtype=torch.uint8, device=device)
    buffer[: len(data)] = data.to(device)
    # Nobody but the source needs to know which rank it is: the others have zeros.
    dist.all_reduce(buffer, op=dist.ReduceOp.MAX)
    if error is not None:
        raise error
    return _decoded(buffer)


def gather_values(value: Any, device: torch.device) -> list[Any]:
    """What JSON makes of the values of all ranks, in their order. Collective: all ranks must call.

    Raises:
        Exception: On a rank whose value cannot be sent, after the last collective; the others get None for it.
    """
    if world_size() == 1:
        return [json.loads(json.dumps(value))]
    data, error = _encoded(value)
    sizes = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(len(data), device=device))
    lengths = [int(size.item()) for size in sizes]
    buffers = [torch.zeros(max(lengths), dtype=torch.uint8, device=device) for _ in lengths]
    padded = torch.zeros_like(buffers[0])
    padded[: len(data)] = data.to(device)
    dist.all_gather(buffers, padded)
    if error is not None:
        raise error
    return [_decoded(buffer[:length]) for buffer, length in zip(buffers, lengths, strict=True)]


_NOTHING = torch.zeros(0, dtype=torch.uint8)


def _encoded(value: Any) -> tuple[Tensor, Exception | None]:
    """Nothing, and why, where JSON has no word for the value."""
    try:
        # JSON escapes whatever is not ASCII.
        return torch.frombuffer(bytearray(json.dumps(value).encode("ascii")), dtype=torch.uint8), None
    except Exception as e:
        return _NOTHING, e


def _decoded(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes() or b"null")
