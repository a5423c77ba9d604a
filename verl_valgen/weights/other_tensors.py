"""The tensors of a model that are no parameters: buffers, and mere attributes of modules.

Rotary tables are buffers that no state dict holds, their originals (`original_inv_freq`) not even buffers in some
versions; and what a constructor drew at random is nowhere but in the model that it made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_ROTARY_TABLE = "inv_freq"


def copy_other_tensors(model: nn.Module, source: Mapping[str, nn.Module], device: torch.device) -> None:
    """Copies from the source what the model's constructor made, in the dtypes in which it made them.

    What the source's forward passes have added since, the model's own will add.

    Args:
        source: The modules of a model of the same structure, sharded in any way, by their clean names. If they are the
            model's own, its tensors are brought to the device.
    """
    done: dict[tuple[int, int], tuple[Any, ...]] = {}
    for name, target in model.named_modules():
        if (module := source.get(name)) is None:
            continue
        for key, buffer in target._buffers.items():
            if buffer is not None and (value := _as_built(module, key)) is not None:
                target._buffers[key] = _copied(value, buffer, device, done)
        for key, value in vars(target).items():
            if not key.startswith("_"):  # a module's own: hooks, parameters, submodules
                target.__dict__[key] = _copied(vars(module).get(key), value, device, done)


def _as_built(module: nn.Module, key: str) -> Tensor | None:
    """A buffer; a rotary table as it was before a long sequence had it computed anew."""
    if key.endswith(_ROTARY_TABLE) and "original" not in key:
        original = getattr(module, f"{key.removesuffix(_ROTARY_TABLE)}original_{_ROTARY_TABLE}", None)
        if isinstance(original, Tensor) and not original.is_meta:
            return original
    return module._buffers.get(key)


def _copied(value: Any, built: Any, device: torch.device, done: dict[tuple[int, int], tuple[Any, ...]]) -> Any:
    """The source's value for the one that the model was built with: a tensor, or a container that may hold some.

    Args:
        done: By what was copied before, so that what several modules share stays one; it keeps all of it alive.
    """
    if isinstance(built, Tensor) and isinstance(value, Tensor):
        if value.is_meta:
            return built
        key = id(value), id(built)
        if key not in done:
            dtype = built.dtype if value.is_floating_point() and built.is_floating_point() else value.dtype
            done[key] = value.detach().to(device=device, dtype=dtype, copy=True), value, built
        return done[key][0]
    if type(built) in (list, tuple) and isinstance(value, list | tuple) and len(value) == len(built):
        return type(built)(_copied(a, b, device, done) for a, b in zip(value, built, strict=True))
    if type(built) is dict and isinstance(value, dict):
        return {key: _copied(value.get(key), item, device, done) for key, item in built.items()}
    return built
