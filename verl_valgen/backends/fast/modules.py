"""Modules that do what several of a model's do, with fewer kernels, whose number decides how long a step takes.

It is worth its lines: a step of a 7.6B model on an H200 takes 10 to 24 percent less time (docs/performance.md).
counterparts.py says which modules of a model they could stand for, and fused.py proves that they do. Where Triton's
kernels can be had they do what comes between the matrix products. What they do torch's operations do elsewhere, and
under torch.compile, which fuses by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from verl_valgen.backends.fast.kernels import are_available

_ACTIVATIONS = {
    "SiLU": "silu_and_mul",
    "SiLUActivation": "silu_and_mul",
    "GELUTanh": "gelu_tanh_and_mul",
    "PytorchGELUTanh": "gelu_tanh_and_mul",
}
"""Class of an activation, torch's and transformers' -> the kernel that has it. That they fit is proven as the rest."""


class FusedNorm(nn.RMSNorm):
    """An RMS norm as one kernel; transformers' classes take eight, torch's own three times as long for few tokens."""

    def __init__(self, norm: Any) -> None:
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        super().__init__(norm.weight.shape, eps=eps, device="meta")
        self.weight = norm.weight
        self.has_kernels = eps is not None and are_available(norm.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_kernels or torch.compiler.is_compiling() or x.dtype != self.weight.dtype:
            return super().forward(x)
        from verl_valgen.backends.fast.kernels.norm import rms_norm

        assert self.eps is not None
        return rms_norm(x.reshape(-1, x.shape[-1]).contiguous(), self.weight, self.eps).view(x.shape)


class FusedMLP(nn.Module):
    """A gated MLP, down(act(gate(x)) * up(x)), with gate and up as one matrix product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj = joined(mlp.gate_proj, mlp.up_proj)
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn
        has_kernels = are_available(mlp.down_proj.weight.device)
        self.kernel = _ACTIVATIONS.get(type(mlp.act_fn).__name__) if has_kernels else None

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(x)
        if self.kernel is not None and not torch.compiler.is_compiling():
            from verl_valgen.backends.fast.kernels import activation

            activate_and_multiply = getattr(activation, self.kernel)
            return self.down_proj(activate_and_multiply(gate_up.flatten(0, -2)).view(*x.shape[:-1], -1))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def joined(*linears: Any) -> nn.Linear:
    """Returns one linear layer with the outputs of several, one after the other.

    From then on those have their parameters in it, with the values that they had: both can be used, and neither takes
    memory of its own. Peak memory above the level before: the joined parameters.
    """
    has_bias = linears[0].bias is not None
    num_outputs = sum(linear.out_features for linear in linears)
    result = nn.Linear(linears[0].in_features, num_outputs, bias=has_bias, device="meta")
    for name in ("weight", "bias") if has_bias else ("weight",):
        parts = [getattr(linear, name).detach() for linear in linears]
        whole = _adjacent(parts)
        if whole is None:
            whole = torch.cat(parts)
            for linear, part in zip(linears, whole.split([len(part) for part in parts]), strict=True):
                setattr(linear, name, nn.Parameter(part, requires_grad=False))
        setattr(result, name, nn.Parameter(whole, requires_grad=False))
    return result


def _adjacent(parts: list[Tensor]) -> Tensor | None:
    """Returns tensors that lie one behind the other in memory as one, None if they do not."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        is_next = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.is_contiguous()
        if not is_next or part.storage_offset() != end:
            return None
        end += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
