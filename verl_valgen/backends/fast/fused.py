"""The same model with fewer kernels: what a step of a few tokens spends its time on is their number, not their work.

Modules that look like the usual decoder's are replaced. Each kind is tried on a probe first, and where the results part
it is left alone. Only for copies of our own. This module knows transformers' models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PROBE_TOKENS = 3


def make_lean(model: PreTrainedModel) -> None:
    """Replaces modules of a plain model in place. Peak memory: the joined weights of one layer above the level before.

    (Inner modules first, for the outer ones are replaced by what holds them.)
    """
    accepted: dict[tuple[Any, ...], bool] = {}
    for make, fits, probe in (
        (_rms_norm, _is_rms_norm, _probe_of_norm),
        (GatedMLP, _is_gated_mlp, _probe_of_mlp),
        (JoinedAttention, _is_attention, _probe_of_attention),
    ):
        # By their places: a list of the modules would keep what is replaced.
        places = [
            (parent, name) for parent in model.modules() for name, child in parent.named_children() if fits(child)
        ]
        for parent, name in places:
            module = getattr(parent, name)
            kind = (type(module), *(tuple(parameter.shape) for parameter in module.parameters()))
            if accepted.get(kind, True):
                replacement = make(module)
                if kind not in accepted:
                    accepted[kind] = _same(module, replacement, probe(module))
                if accepted[kind]:
                    setattr(parent, name, replacement)
            del module


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) with gate and up as one product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj = _joined(mlp.gate_proj, mlp.up_proj)
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class JoinedAttention(nn.Module):
    """Attention with rotary positions as Llama has it: one product for queries, keys and values, one rotation for
    queries and keys."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.config: Any = attention.config
        # What transformers' attention functions ask of a module.
        vars(self).update({name: value for name, value in vars(attention).items() if not name.startswith("_")})
        self.training = False
        self.qkv_proj = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
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
        """Of (B, S, hidden_size), with (B, S, head_dim) cosines and sines."""
        states = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # (B, S, num_heads of all, head_dim)
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


def _joined(*linears: Any) -> nn.Linear:
    """One linear layer with the outputs of several."""
    has_bias = linears[0].bias is not None
    num_outputs = sum(linear.out_features for linear in linears)
    result = nn.Linear(linears[0].in_features, num_outputs, bias=has_bias, device="meta")
    for name in ("weight", "bias") if has_bias else ("weight",):
        values = torch.cat([getattr(linear, name).detach() for linear in linears])
        setattr(result, name, nn.Parameter(values, requires_grad=False))
    return result


def _rms_norm(module: Any) -> nn.Module:
    """`torch.nn.RMSNorm`, one kernel in recent versions, where transformers' classes take eight."""
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


def _probe_of_norm(module: Any) -> dict[str, Any]:
    return {"hidden_states": _waves(module.weight, module.weight.shape[0])}


def _probe_of_mlp(module: Any) -> dict[str, Any]:
    return {"x": _waves(module.down_proj.weight, module.gate_proj.in_features)}


def _probe_of_attention(module: Any) -> dict[str, Any]:
    weight = module.q_proj.weight
    angles = _waves(weight, module.head_dim).float()
    return {
        "hidden_states": _waves(weight, weight.shape[1]),
        "position_embeddings": (angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)),
        "attention_mask": None,
        "past_key_values": None,
    }


def _waves(like: Tensor, size: int) -> Tensor:
    """(1, S, size) of the size that activations have; no random numbers."""
    steps = torch.arange(_PROBE_TOKENS * size, device=like.device).reshape(1, _PROBE_TOKENS, size)
    return (torch.sin(steps * 0.7 + 0.3) * 2).to(like.dtype)


@torch.no_grad()
def _same(module: nn.Module, replacement: nn.Module, probe: dict[str, Any]) -> bool:
    """Whether both give the same, up to the roundings of a few operations in the model's dtype."""
    try:
        outputs = module(**probe), replacement(*probe.values())
    except Exception:  # whatever a class that we do not know makes of a probe
        return False
    expected, actual = ((output[0] if isinstance(output, tuple) else output).float() for output in outputs)
    if expected.shape != actual.shape:
        return False
    tolerance = 8 * torch.finfo(next(module.parameters()).dtype).eps
    return bool((expected - actual).norm() <= tolerance * expected.norm())
