"""A key/value cache of fixed place and size, written where a tensor on the device says.

transformers' own `StaticCache` keeps its position in another way in each major version, and attends to the whole cache
during the prefill.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class FixedCache(Cache):
    """
    Args:
        cache_length: L, the most tokens of a padded prompt and its answer.
        slot: (1,) int64, where a step writes.
    """

    def __init__(self, num_layers: int, cache_length: int, slot: Tensor) -> None:
        super().__init__(layers=[FixedLayer(cache_length, slot) for _ in range(num_layers)])

    def set_prefill(self, prefill: bool) -> None:
        """Whether prompts come next, to be written from the beginning, or single tokens."""
        for layer in self.layers:
            assert isinstance(layer, FixedLayer)
            layer.prefill = prefill


class FixedLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, num_key_value_heads, L, head_dim) each, allocated when the first come."""

    keys: Tensor
    values: Tensor
    is_compileable = True
    is_sliding = False

    def __init__(self, cache_length: int, slot: Tensor) -> None:
        super().__init__()
        self.cache_length, self.slot = cache_length, slot
        self.prefill = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # type: ignore[override]
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.cache_length, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes (B, num_key_value_heads, N, head_dim) states: of whole prompts, or of one token at the slot.

        Returns:
            What attention is over: the prompts, or the whole cache, whose unwritten part a mask must hide.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.prefill:
            for cache, states in ((self.keys, key_states), (self.values, value_states)):
                cache[:, :, : states.shape[2]] = states
                cache[:, :, states.shape[2] :] = 0  # a mask hides what a batch before left there, but for NaN
            return key_states, value_states
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Of the prompts; a step brings its own mask. (transformers 4 passes the positions, not their number.)"""
        return (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_seq_length(self, *args: Any) -> int:
        return 0  # as it is before the prefill; a step brings its own positions

    def get_max_length(self) -> int:
        return self.cache_length

    get_max_cache_shape = get_max_length
