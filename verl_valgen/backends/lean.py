"""The same model with fewer kernels: what a step of a few tokens spends its time on is their number, not their work.

Replaced is only what a plain module does as well: each class is tried on a probe, and left alone where the results
part. Only for copies of our own. This module knows transformers' models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from verl_valgen.patching import patched

_ATTENTION = "verl_valgen_decoding"


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) with gate and up as one product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj = joined([mlp.gate_proj, mlp.up_proj])
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def rms_norm(module: Any) -> nn.Module:
    """`torch.nn.RMSNorm`, one kernel in recent versions, in place of a transformers class that takes eight."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    norm = nn.RMSNorm(module.weight.shape, eps=eps, device="meta")
    norm.weight = module.weight
    return norm


def joined(linears: list[nn.Linear]) -> nn.Linear:
    """One linear layer with the outputs of several, whose weights become views of its own."""
    first = linears[0]
    result = nn.Linear(first.in_features, 0, bias=first.bias is not None, device="meta")
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is not None:
            setattr(result, name, nn.Parameter(torch.cat(parts), requires_grad=False))
    result.out_features = result.weight.shape[0]
    return result


def make_lean(model: PreTrainedModel) -> None:
    """Replaces modules of a plain model in place. Peak memory: that of one layer's MLP above the level before."""
    accepted: dict[tuple[Any, ...], bool] = {}
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            replacement = _replacement(module)
            if replacement is None:
                continue
            kind = (type(module), type(replacement), getattr(module, "variance_epsilon", None))
            if kind not in accepted:
                accepted[kind] = _same(module, replacement)
            if accepted[kind]:
                setattr(parent, name, replacement)


def _replacement(module: nn.Module) -> nn.Module | None:
    names = {name for name, _ in module.named_children()}
    if type(module).__name__.endswith("RMSNorm") and not names and isinstance(getattr(module, "weight", None), Tensor):
        return rms_norm(module)
    return None


@torch.no_grad()
def _same(module: nn.Module, replacement: nn.Module) -> bool:
    """Whether both give the same on a probe, up to a rounding or two."""
    weight = next(module.parameters())
    # No random numbers, and no zeros; of the size that activations have.
    steps = torch.arange(2 * weight.shape[-1], device=weight.device).reshape(2, -1)
    probe = torch.sin(steps * 0.7 + 0.3).mul(3.0).to(weight.dtype)
    try:
        expected, actual = module(probe).float(), replacement(probe).float()
    except Exception:
        return False
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return expected.shape == actual.shape and torch.allclose(expected, actual, rtol=tolerance, atol=tolerance)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one token to the cache. The query heads that share a key/value head take the place of the tokens of
    one sequence, so that keys and values are read as they are: `repeat_kv` would copy them for every head.

    Args:
        query: (B, num_heads, 1, D).
        key: (B, num_key_value_heads, L, D), and value.
        attention_mask: (B, 1, 1, L) in the query's dtype, added to the scores.

    Returns:
        (B, 1, num_heads, D), and no weights.
    """
    batch_size, num_heads, _, head_dim = query.shape
    num_groups = num_heads // key.shape[1]
    output = F.scaled_dot_product_attention(
        query.reshape(batch_size, key.shape[1], num_groups, head_dim),
        key,
        value,
        attn_mask=attention_mask.expand(-1, key.shape[1], num_groups, -1),
        scale=scaling,
    )  # (B, num_key_value_heads, num_groups, D)
    return output.reshape(batch_size, 1, num_heads, value.shape[-1]), None


@contextmanager
def attention_for_decoding(model: PreTrainedModel) -> Iterator[None]:
    """While it is open, a model with torch's attention has `grouped_attention`."""
    config: Any = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(_ATTENTION, grouped_attention)
    with patched(config, "_attn_implementation", _ATTENTION):
        yield
