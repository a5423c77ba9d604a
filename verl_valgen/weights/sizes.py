"""How large a model is as a whole, of which every rank holds a share."""

from __future__ import annotations

import torch
from torch import nn


def largest_unit_bytes(wrapped: nn.Module) -> int:
    """The most bytes that a gather holds at any one time beside the copy: an FSDP1 unit in float32, or one parameter
    twice. Not collective."""
    sizes = [0]
    for parameter in wrapped.parameters():
        if (flat_size := _flat_size(parameter)) is not None:
            sizes.append(flat_size * torch.float32.itemsize)
        else:
            sizes.append(2 * parameter.numel() * parameter.element_size())
    return max(sizes)


def num_parameters(wrapped: nn.Module) -> int:
    """The number of parameters of the whole model, adapters included, however it is sharded. Not collective."""
    sizes = ((_flat_size(parameter), parameter.numel()) for parameter in wrapped.parameters())
    return sum(own if flat is None else flat for flat, own in sizes)


def _flat_size(parameter: nn.Parameter) -> int | None:
    """The number of elements of a whole FSDP1 unit, None for a parameter that is not one.

    A unit is one flat parameter, which holds this rank's share or, between some passes, the whole: its own `numel()` is
    either. (That of a DTensor is always the whole.)
    """
    size: torch.Size | None = getattr(parameter, "_unpadded_unsharded_size", None)
    return None if size is None else size.numel()
