"""A module that does what llama's attention does, with fewer kernels. modules.py has the others, and says more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from verl_valgen.backends.fast.cache import RowCache
from verl_valgen.backends.fast.kernels import are_available
from verl_valgen.backends.fast.modules import FusedNorm, joined


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
        self.has_kernels = self.num_heads[1] == self.num_heads[2] and are_available(attention.q_proj.weight.device)

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
        states = self.qkv_proj(hidden_states)  # (B, S, sum(num_heads) * head_dim)
        if self.has_kernels and not torch.compiler.is_compiling() and states.dtype == position_embeddings[0].dtype:
            rows = step_rows(past_key_values, self.layer_idx)
            if rows is not None and rows[0].dtype == states.dtype:
                return self.o_proj(self.attend_by_kernels(states, position_embeddings, *rows)), None
            query, key, value = self.rotate_by_kernel(states, position_embeddings)
        else:
            query, key, value = self.rotate(states, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )  # (B, S, num_queries, head_dim)
        return self.o_proj(output.flatten(2)), weights

    def rotate(self, states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries and keys, normed and turned, and values: (B, heads, S, head_dim) each."""
        states = states.unflatten(-1, (-1, self.head_dim))
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
        query, key = rotated.split([num_queries, num_keys], dim=2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def rotate_by_kernel(
        self, states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Does what `rotate` does with a kernel, for which each token is a row with a cache of one slot."""
        shape = states.shape[:2]
        keys, values = states.new_empty(2, shape.numel(), self.num_heads[1], 1, self.head_dim)
        slots = torch.zeros(shape.numel(), dtype=torch.int64, device=states.device)
        query = self.rotate_and_store(states, position_embeddings, keys, values, slots)
        parts = (part.unflatten(0, shape).transpose(1, 2) for part in (query, keys[:, :, 0], values[:, :, 0]))
        return next(parts), next(parts), next(parts)

    def attend_by_kernels(
        self, states: Tensor, position_embeddings: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, slots: Tensor
    ) -> Tensor:
        """Computes attention of one token per row, S = 1, to what the row holds with the token itself.

        Args:
            keys: (B, num_key_value_heads, L, head_dim), the cache's; the tokens' are written into it.
            values: Likewise.
            slots: (B,) int64, where they are written.

        Returns:
            (B, 1, num_queries * head_dim).
        """
        from verl_valgen.backends.fast.kernels.attention import decode_attention

        query = self.rotate_and_store(states, position_embeddings, keys, values, slots)
        return decode_attention(query, keys, values, slots, self.scaling).flatten(1)[:, None]

    def rotate_and_store(
        self, states: Tensor, position_embeddings: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, slots: Tensor
    ) -> Tensor:
        """Returns the queries of N = B * S tokens, (N, num_queries, head_dim), and writes keys and values.

        Args:
            keys: (N, num_key_value_heads, L, head_dim).
            values: Likewise.
            slots: (N,) int64.
        """
        from verl_valgen.backends.fast.kernels.rotary import rotate_and_store

        cos, sin = (table.expand(*states.shape[:2], -1).flatten(0, 1) for table in position_embeddings)
        states = states.flatten(0, 1)
        weights, eps = None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            norms = (self.q_norm, self.k_norm)
            if all(isinstance(norm, FusedNorm) and norm.has_kernels and norm.eps == norms[0].eps for norm in norms):
                weights, eps = (norms[0].weight, norms[1].weight), norms[0].eps
            else:
                query, key, value = states.unflatten(-1, (-1, self.head_dim)).split(self.num_heads, dim=1)
                states = torch.cat([norms[0](query), norms[1](key), value], dim=1).flatten(1)
        return rotate_and_store(states, cos, sin, keys, values, slots, self.num_heads[0], weights, eps)


def step_rows(cache: Any, layer_idx: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns a layer's keys, values and slots of the rows that a step is for; None if what comes is no such step."""
    if not isinstance(cache, RowCache) or cache.place.prompt_rows is not None:
        return None
    layer: Any = cache.layers[layer_idx]
    if not layer.is_initialized:
        return None
    num_rows, reach = cache.place.num_rows, cache.place.reach
    return layer.keys[:num_rows, :, :reach], layer.values[:num_rows, :, :reach], cache.slots
