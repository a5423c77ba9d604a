"""Gathers the tensors of an FSDP2 model, several in one collective.

`DTensor.full_tensor` takes half a millisecond of Python for each, which for a model's hundreds of matrices is ten times
what their bytes take on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

_ALIGNMENT = 16
"""Bytes: of the largest element of a tensor."""

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Into one tensor, by the name that it has from torch 2.13 on, or the one before."""


class Wanted(NamedTuple):
    """A tensor that is to be gathered."""

    name: str
    parameter: Tensor
    """A DTensor, or one that is whole on every rank."""
    dtype: torch.dtype
    """To which its shards are cast before they are sent."""


class _Shares(NamedTuple):
    """Whose shards make a tensor whole: the ranks along one dimension of a mesh, each with as many rows."""

    mesh: Any
    dim: int

    @property
    def num_ranks(self) -> int:
        size: int = self.mesh.size(self.dim)
        return size

    def num_rows(self, parameter: Tensor) -> int:
        """Of a rank's shard; the last ones may have fewer, or none."""
        return math.ceil(parameter.shape[0] / self.num_ranks)

    def num_bytes(self, wanted: Wanted) -> int:
        """That a rank sends of a tensor, with what it is padded by."""
        shape = wanted.parameter.shape
        num_bytes = self.num_rows(wanted.parameter) * shape[1:].numel() * wanted.dtype.itemsize
        return math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT


def whole_tensors(wanted: Sequence[Wanted], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yields tensors by their names, whole, in their order. Collective: all ranks must exhaust it.

    The order, the shapes and the dtypes must be the same on all ranks. A tensor is valid until the next one is asked
    for. It takes no more memory than twice the largest tensor, with padding, and a rank's share of that.

    Args:
        device: The rank's own device; shards are brought there first.
    """
    most_bytes = max((_whole_bytes(one) for one in wanted), default=0) // 2
    for shares, batch in _batches(wanted, most_bytes):
        if shares is None:
            for name, parameter, dtype in batch:
                yield name, _whole_tensor(parameter, dtype, device)
        else:
            yield from _gathered(shares, batch, device)


def _batches(wanted: Iterable[Wanted], most_bytes: int) -> Iterator[tuple[_Shares | None, list[Wanted]]]:
    """What may be gathered in one collective each, of at most so many bytes, but for a tensor that alone has more."""
    batch: list[Wanted] = []
    shares, num_bytes = None, 0
    for one in wanted:
        own_shares = _shares(one.parameter)
        own_bytes = _whole_bytes(one) if own_shares is None else own_shares.num_ranks * own_shares.num_bytes(one)
        if batch and (own_shares != shares or num_bytes + own_bytes > most_bytes):
            yield shares, batch
            batch, num_bytes = [], 0
        batch.append(one)
        shares, num_bytes = own_shares, num_bytes + own_bytes
    if batch:
        yield shares, batch


def _whole_bytes(wanted: Wanted) -> int:
    return wanted.parameter.numel() * wanted.dtype.itemsize


def _shares(parameter: Tensor) -> _Shares | None:
    """As FSDP2 shards by default: by rows, along one dimension of the mesh. None for what is otherwise."""
    if not isinstance(parameter, DTensor) or parameter.numel() == 0:
        return None
    sharded = [dim for dim, placement in enumerate(parameter.placements) if type(placement) is not Replicate]
    if len(sharded) != 1:
        return None
    placement = parameter.placements[sharded[0]]
    return _Shares(parameter.device_mesh, sharded[0]) if type(placement) is Shard and placement.dim == 0 else None


def _whole_tensor(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter.to(device=device, dtype=dtype)
    shard = parameter.to_local().to(device=device, dtype=dtype)
    return DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    ).full_tensor()  # fmt: skip


@torch.no_grad()
def _send_and_receive(shares: _Shares, batch: Sequence[Wanted], device: torch.device) -> Tensor:
    """(number of ranks, B) bytes: the shards of each rank, one behind the other."""
    nums_bytes = [shares.num_bytes(one) for one in batch]
    own = torch.empty(sum(nums_bytes), dtype=torch.uint8, device=device)
    for one, place in zip(batch, own.split(nums_bytes), strict=True):
        shard = one.parameter.to_local()  # type: ignore[attr-defined]
        place[: shard.numel() * one.dtype.itemsize].view(one.dtype).copy_(shard.reshape(-1))  # cast before it is sent
    if shares.num_ranks == 1:
        return own[None]
    everyones = own.new_empty(shares.num_ranks, len(own))
    _all_gather(everyones.view(-1), own, shares.mesh.get_group(shares.dim))
    return everyones


def _gathered(shares: _Shares, batch: Sequence[Wanted], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    everyones = _send_and_receive(shares, batch, device)
    for one, place in zip(batch, everyones.split([shares.num_bytes(one) for one in batch], dim=1), strict=True):
        shape = one.parameter.shape
        num_rows = shares.num_rows(one.parameter)
        rows = place[:, : num_rows * shape[1:].numel() * one.dtype.itemsize].view(one.dtype)
        yield one.name, rows.reshape(shares.num_ranks * num_rows, *shape[1:])[: shape[0]]
