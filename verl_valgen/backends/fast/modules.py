"""Modules that do what several of a model's do, with fewer kernels, whose number decides how long a step takes.

It is worth its lines: a step of a 7.6B model on an H200 takes 10 to 24 percent less time (docs/performance.md).
counterparts.py says which modules of a model they could stand for, and fused.py proves that they do. Where Triton's
kernels can be had they do what comes between the matrix products: of a step's attention all, with a `RowCache`. What
they do torch's operations do elsewhere, and under torch.compile, which fuses by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from verl_valgen.backends.fast.cache import RowCache
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


class FusedAttention(nn.Module):
    """Llama's attention with one matrix product for queries, keys and values and one rotation for queries and keys.

    With norms of queries and keys where the original has them, as Qwen3's.
    """

    head_dim: int
    layer_idx: int
    scaling: float

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
        self.has_kernels = are_available(attention.q_proj.weight.device)

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
            attention_mask: As the attention function of the model's configuration takes it. Kernels need none: in a
                step a row sees what it holds.
            past_key_values: A transformers `Cache`. With a `RowCache` in a step, kernels do the whole of it.

        Returns:
            (B, S, hidden_size), and whatever the attention function returns for the weights.
        """
        states = self.qkv_proj(hidden_states)
        if self.has_kernels and not torch.compiler.is_compiling():
            rows = step_rows(past_key_values, self.layer_idx)
            if rows is not None and states.dtype == position_embeddings[0].dtype == rows[0].dtype:
                return self.o_proj(self.attend_by_kernels(states, position_embeddings, *rows)), None
        states = states.unflatten(-1, (-1, self.head_dim))  # (B, S, sum(num_heads), head_dim)
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

    def attend_by_kernels(
        self, states: Tensor, position_embeddings: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, slots: Tensor
    ) -> Tensor:
        """Computes attention of one token per row to what the row holds, with the token itself.

        Args:
            states: (B, 1, sum(num_heads) * head_dim), queries, keys and values of the tokens.
            position_embeddings: As in `forward`.
            keys: (B, num_key_value_heads, L, head_dim), the cache's; the tokens' are written into it.
            values: Likewise.
            slots: (B,) int64, where they are written.

        Returns:
            (B, 1, num_queries * head_dim).
        """
        from verl_valgen.backends.fast.kernels.attention import decode_attention
        from verl_valgen.backends.fast.kernels.rotary import rotate_and_store

        states = states[:, 0]
        norm_weights, norm_eps = None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            if all(isinstance(norm, FusedNorm) and norm.has_kernels for norm in (self.q_norm, self.k_norm)):
                norm_weights, norm_eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
            else:
                query, key, value = states.unflatten(-1, (-1, self.head_dim)).split(self.num_heads, dim=1)
                states = torch.cat([self.q_norm(query), self.k_norm(key), value], dim=1).flatten(1)
        cos, sin = (table[:, 0].expand(len(states), -1) for table in position_embeddings)
        query = rotate_and_store(states, cos, sin, keys, values, slots, self.num_heads[0], norm_weights, norm_eps)
        return decode_attention(query, keys, values, slots, self.scaling).flatten(1)[:, None]


def step_rows(cache: Any, layer_idx: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns a layer's keys, values and slots of the rows that a step is for; None if what comes is no such step."""
    if not isinstance(cache, RowCache) or cache.place.prompt_rows is not None:
        return None
    layer: Any = cache.layers[layer_idx]
    if not layer.is_initialized:
        return None
    num_rows, reach = cache.place.num_rows, cache.place.reach
    return layer.keys[:num_rows, :, :reach], layer.values[:num_rows, :, :reach], cache.slots


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
