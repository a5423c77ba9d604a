"""Fuses modules of a model into fewer kernels, whose number decides how long a step of a few tokens takes.

It is worth its lines: a step of a 7.6B model on an H200 takes 10 to 24 percent less time (docs/performance.md).
Modules that look like those of the usual decoder are replaced. The first of each kind is tried on a probe, and where
the results differ the kind is left alone. For our own copies only. This module knows transformers' models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PROBE_TOKENS = 3


def fuse(model: PreTrainedModel) -> None:
    """Replaces norms, MLPs and attention of an unsharded model in place, where the result is the same.

    Peak memory above the level before: the concatenated weights of one layer.
    """
    accepted: dict[tuple[Any, ...], bool] = {}
    # Norms first: the replacement of an attention takes over the norms that are within it.
    for make, fits, make_probe in (
        (_rms_norm, _is_rms_norm, _norm_probe),
        (FusedMLP, _is_gated_mlp, _mlp_probe),
        (FusedAttention, _is_attention, _attention_probe),
    ):
        # Parents and names: a list of the modules themselves would keep those that are replaced in memory.
        slots = [(parent, name) for parent in model.modules() for name, child in parent.named_children() if fits(child)]
        for parent, name in slots:
            module = getattr(parent, name)
            kind = (type(module), *(tuple(parameter.shape) for parameter in module.parameters()))
            if accepted.get(kind, True):
                replacement = make(module)
                if kind not in accepted:
                    accepted[kind] = _gives_the_same(module, replacement, make_probe(module))
                if accepted[kind]:
                    setattr(parent, name, replacement)
            del module


class FusedMLP(nn.Module):
    """A gated MLP, down(act(gate(x)) * up(x)), with gate and up as one matrix product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj = _concatenated(mlp.gate_proj, mlp.up_proj)
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class FusedAttention(nn.Module):
    """Llama's attention with one matrix product for queries, keys and values and one rotation for queries and keys.

    With norms of queries and keys where the original has them, as Qwen3's.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.config: Any = attention.config
        # transformers' attention functions read attributes of the module.
        vars(self).update({name: value for name, value in vars(attention).items() if not name.startswith("_")})
        self.training = False
        self.qkv_proj = _concatenated(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = attention.o_proj
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.num_heads = [linear.out_features // attention.head_dim for linear in linears]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes what the original module does, from (B, S, hidden_size) states.

        Args:
            hidden_states: (B, S, hidden_size).
            position_embeddings: Cosines and sines of the rotation, (B, S, head_dim) each.
            attention_mask: As the attention function of the model's configuration takes it.
            past_key_values: A transformers `Cache`.

        Returns:
            (B, S, hidden_size), and whatever the attention function returns for the weights.
        """
        states = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # (B, S, sum(num_heads), head_dim)
        num_queries, num_keys, num_values = self.num_heads
        query_key, value = states.split([num_queries + num_keys, num_values], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = query_key.split([num_queries, num_keys], dim=2)
            query_key = torch.cat([self.q_norm(query), self.k_norm(key)], dim=2)
        cos, sin = (table.unsqueeze(2) for table in position_embeddings)
        first_half, second_half = query_key.chunk(2, dim=-1)
        rotated = query_key * cos + torch.cat([-second_half, first_half], dim=-1) * sin
        query, key = (part.transpose(1, 2) for part in rotated.split([num_queries, num_keys], dim=2))
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )  # (B, S, num_queries, head_dim)
        return self.o_proj(output.flatten(2)), weights


def _concatenated(*linears: Any) -> nn.Linear:
    """Returns one linear layer with the outputs of several, one after the other."""
    has_bias = linears[0].bias is not None
    num_outputs = sum(linear.out_features for linear in linears)
    result = nn.Linear(linears[0].in_features, num_outputs, bias=has_bias, device="meta")
    for name in ("weight", "bias") if has_bias else ("weight",):
        values = torch.cat([getattr(linear, name).detach() for linear in linears])
        setattr(result, name, nn.Parameter(values, requires_grad=False))
    return result


def _rms_norm(module: Any) -> nn.Module:
    """Returns a `torch.nn.RMSNorm`, which is one kernel in recent versions; transformers' classes take eight."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    norm = nn.RMSNorm(module.weight.shape, eps=eps, device="meta")
    norm.weight = module.weight
    return norm


def _is_rms_norm(module: nn.Module) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm")
        and not isinstance(module, nn.RMSNorm)
        and [name for name, _ in module.named_parameters()] == ["weight"]
    )


def _is_gated_mlp(module: nn.Module) -> bool:
    children, projections = dict(module.named_children()), {"gate_proj", "up_proj", "down_proj"}
    return (
        projections <= children.keys() <= projections | {"act_fn"}
        and all(type(children[name]) is nn.Linear for name in projections)
        and hasattr(module, "act_fn")
    )


def _is_attention(module: Any) -> bool:
    children, projections = dict(module.named_children()), {"q_proj", "k_proj", "v_proj", "o_proj"}
    return (
        projections <= children.keys() <= projections | {"q_norm", "k_norm"}
        and all(type(children[name]) is nn.Linear for name in projections)
        and len({children[name].bias is None for name in ("q_proj", "k_proj", "v_proj")}) == 1
        and not module._parameters
        and all(hasattr(module, name) for name in ("config", "head_dim", "scaling", "layer_idx"))
        and module.config._attn_implementation == "sdpa"
    )


def _norm_probe(module: Any) -> dict[str, Any]:
    return {"hidden_states": _activations(module.weight, module.weight.shape[0])}


def _mlp_probe(module: Any) -> dict[str, Any]:
    return {"x": _activations(module.down_proj.weight, module.gate_proj.in_features)}


def _attention_probe(module: Any) -> dict[str, Any]:
    weight = module.q_proj.weight
    angles = _activations(weight, module.head_dim).float()
    return {
        "hidden_states": _activations(weight, weight.shape[1]),
        "position_embeddings": (angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)),
        "attention_mask": None,
        "past_key_values": None,
    }


def _activations(like: Tensor, size: int) -> Tensor:
    """Returns (1, S, size) numbers of the magnitude of activations, without a random generator."""
    steps = torch.arange(_PROBE_TOKENS * size, device=like.device).reshape(1, _PROBE_TOKENS, size)
    return (torch.sin(steps * 0.7 + 0.3) * 2).to(like.dtype)


@torch.no_grad()
def _gives_the_same(module: nn.Module, replacement: nn.Module, probe: dict[str, Any]) -> bool:
    """Compares the outputs for a probe: equal up to the rounding of a few operations in the model's dtype.

    Args:
        probe: The module's arguments by name, in the order in which the replacement takes them.
    """
    try:
        outputs = module(**probe), replacement(*probe.values())
    except Exception:  # a class that we do not know may do anything with a probe
        return False
    expected, actual = ((output[0] if isinstance(output, tuple) else output).float() for output in outputs)
    if expected.shape != actual.shape:
        return False
    tolerance = 8 * torch.finfo(next(module.parameters()).dtype).eps
    return bool((expected - actual).norm() <= tolerance * expected.norm())
