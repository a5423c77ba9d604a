"""Modules that do what several of a model's do, with fewer kernels, whose number decides how long a step takes.

It is worth its lines: a step of a 7.6B model on an H200 takes 10 to 24 percent less time (docs/performance.md).
counterparts.py says which modules of a model they could stand for, and fused.py proves that they do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class FusedMLP(nn.Module):
    """A gated MLP, down(act(gate(x)) * up(x)), with gate and up as one matrix product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj = joined(mlp.gate_proj, mlp.up_proj)
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class FusedAttention(nn.Module):
    """Llama's attention with one matrix product for queries, keys and values and one rotation for queries and keys.

    With norms of queries and keys where the original has them, as Qwen3's.
    """

    head_dim: int

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.config: Any = attention.config
        # transformers' attention functions read attributes of the module.
        vars(self).update({name: value for name, value in vars(attention).items() if not name.startswith("_")})
        self.training = False
        self.qkv_proj = joined(attention.q_proj, attention.k_proj, attention.v_proj)
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
            position_embeddings: Cosines and sines of the rotation, (B, S, R) each, R <= head_dim: of the first R
                numbers of a head.
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
        size = cos.shape[-1]
        turning, resting = query_key[..., :size], query_key[..., size:]
        first_half, second_half = turning.chunk(2, dim=-1)
        rotated = turning * cos + torch.cat([-second_half, first_half], dim=-1) * sin
        if size < self.head_dim:
            rotated = torch.cat([rotated, resting], dim=-1)
        query, key = (part.transpose(1, 2) for part in rotated.split([num_queries, num_keys], dim=2))
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )  # (B, S, num_queries, head_dim)
        return self.o_proj(output.flatten(2)), weights


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


def fused_norm(module: Any) -> nn.Module:
    """Returns a `torch.nn.RMSNorm`, which is one kernel in recent versions; transformers' classes take eight."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    norm = nn.RMSNorm(module.weight.shape, eps=eps, device="meta")
    norm.weight = module.weight
    return norm
