"""A key/value cache that is allocated once and written at a position that a tensor on the device holds.

A CUDA graph can hold such a write. transformers' own `StaticCache` keeps its position in another way in each major
version, and attends to the whole cache during the prefill.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class FixedCache(Cache):
    """The key/value cache of all layers, of one length throughout.

    Args:
        num_layers: Number of the model's layers.
        cache_length: L, the most tokens of a padded prompt and its answer.
        slot: (1,) int64 on the device, the position that a step writes to. The caller advances it in place.
    """

    def __init__(self, num_layers: int, cache_length: int, slot: Tensor) -> None:
        super().__init__(layers=[FixedLayer(cache_length, slot) for _ in range(num_layers)])

    def set_prefill(self, prefill: bool) -> None:
        """Sets what comes next: prompts, written from the beginning, or one token per sequence, written at the slot."""
        for layer in self.layers:
            assert isinstance(layer, FixedLayer)
            layer.prefill = prefill

    def set_reported_length(self, length: int) -> None:
        """Sets what `get_seq_length` says in steps. It is a number of the host, so that a graph could hold but one."""
        for layer in self.layers:
            assert isinstance(layer, FixedLayer)
            layer.reported_length = length


class FixedLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, num_key_value_heads, L, head_dim) each, allocated at the first update."""

    keys: Tensor
    values: Tensor
    is_compileable = True
    is_sliding = False

    def __init__(self, cache_length: int, slot: Tensor) -> None:
        super().__init__()
        self.cache_length, self.slot = cache_length, slot
        self.prefill = True
        self.reported_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # type: ignore[override]
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.cache_length, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of whole prompts, or of one token per sequence at the slot.

        Args:
            key_states: (B, num_key_value_heads, N, head_dim), N = 1 for single tokens.
            value_states: Of the same shape.

        Returns:
            The keys and values to attend to: those of the prompts, or the whole cache, whose unwritten part a mask must
            hide.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.prefill:
            for cache, states in ((self.keys, key_states), (self.values, value_states)):
                cache[:, :, : states.shape[2]] = states
                cache[:, :, states.shape[2] :] = 0  # a mask hides what an earlier batch left there, but not NaN
            return key_states, value_states
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Returns the length and offset that transformers builds the prompts' mask with; a step brings its own mask.

        Args:
            query_length: The number of tokens; from transformers 4 their positions, (N,).
        """
        return (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self.prefill else self.reported_length  # a step brings its own positions

    def get_max_length(self) -> int:
        return self.cache_length

    get_max_cache_shape = get_max_length
