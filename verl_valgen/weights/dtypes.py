"""The dtype of every tensor of a model, as transformers' `from_pretrained(dtype=...)` gives it.

There the constructor runs under the default dtype asked for, so that what names no dtype has that one, and what names
float32 (rotary tables, a router's correction) keeps it; and classes list what else stays in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """While open, floating-point tensors of no named dtype get this one, in all threads, as in `from_pretrained`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def set_config_dtype(config: Any, dtype: torch.dtype) -> None:
    """Sets the dtype in a configuration and in its parts, by which constructors build parts of a model."""
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            set_config_dtype(part, dtype)


_NARROW = (torch.bfloat16, torch.float16)


def keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Gives those tensors of an empty model float32 that its class keeps there when it is loaded in `dtype`.

    In float32 that is all of them, whatever a constructor names: a copy in float32 rounds nothing.

    Args:
        model: A transformers model with all of its parameters on the meta device; tied ones stay tied.
    """
    pattern = _kept_in_float32(model, dtype)
    new: dict[int, nn.Parameter] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_kept = pattern is not None and tensor.is_floating_point() and pattern.search(name)
        if not is_kept and not (dtype is torch.float32 and tensor.dtype in _NARROW):
            continue
        module, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if attribute in module._buffers:
            module._buffers[attribute] = tensor.float()
        else:
            new[id(tensor)] = nn.Parameter(tensor.detach().float(), requires_grad=False)
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            module._parameters[attribute] = new.get(id(parameter), parameter)


def _kept_in_float32(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """What matches the names of tensors that stay in float32, None where there are none."""
    if hasattr(model, "_get_dtype_plan"):  # transformers 5
        plan = model._get_dtype_plan(dtype)
        patterns = [name.replace("*", ".*") for name, kept in plan.items() if kept is torch.float32]
    else:
        names: list[str] = []
        if dtype is torch.float16:
            names += getattr(model, "_keep_in_fp32_modules", None) or []
        if dtype in (torch.float16, torch.bfloat16):
            names += getattr(model, "_keep_in_fp32_modules_strict", None) or []
        patterns = [rf"(^|\.){name}($|\.)" for name in names]
    return re.compile("|".join(patterns)) if patterns else None
