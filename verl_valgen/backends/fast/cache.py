"""A key/value cache that is allocated once, whose rows are filled, read and replaced one by one.

A row holds its tokens from slot 0 on, without padding. Where a step writes, a tensor on the device says, so that a CUDA
graph can hold it. transformers' own `StaticCache` has one position for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Place:
    """What the next forward pass writes and reads; all layers of a cache share one."""

    slots: Tensor
    """(B,) int64 on the device: the number of tokens that a row holds, which is where a step writes the next."""
    num_rows: int
    """The rows of a step are the first so many."""
    reach: int
    """A step sees so many slots at most: more than any of its rows holds."""
    row_ids: Tensor
    """0..B-1 on the device."""
    reported_length: int = 0
    """What `get_seq_length` says in steps. It is a number of the host, so that a graph could hold but one."""
    prompt_rows: Tensor | None = None
    """(N,) int64, the rows that prompts are written to; None: what comes next is a step."""
    is_padding: Tensor | None = None
    """(N, S) bool: which of the tokens that come next are behind a prompt."""


class RowCache(Cache):
    """The key/value cache of all layers.

    What a row does not hold is finite at any time, as a mask hides it from sums, but not NaN.

    Args:
        num_layers: Number of the model's layers.
        cache_length: L, the most tokens of a prompt and its answer.
        slots: (B,) int64 on the device, see `Place`; the caller advances them in place. Each must be below L.
    """

    def __init__(self, num_layers: int, cache_length: int, slots: Tensor) -> None:
        num_rows = len(slots)
        self.cache_length = cache_length
        self.place = Place(slots, num_rows, cache_length, torch.arange(num_rows, device=slots.device))
        super().__init__(layers=[RowLayer(num_rows, cache_length, self.place) for _ in range(num_layers)])

    def begin_prompts(self, rows: Tensor, lengths: Tensor, longest: int) -> None:
        """What comes next are N prompts, padded on the right, that become the contents of (N,) rows.

        Args:
            lengths: (N,) int64, without the padding.
            longest: The largest of them.
        """
        self.place.prompt_rows, self.place.is_padding = rows, _is_padding(lengths, longest)

    def begin_steps(self, num_rows: int, reach: int) -> None:
        """What comes next is one token for each of the first rows, written at their slots. See `Place`."""
        self.place.prompt_rows = self.place.is_padding = None
        self.place.num_rows, self.place.reach = num_rows, reach

    @property
    def slots(self) -> Tensor:
        """(B',) int64: where a step writes, and the last slot that it sees, for each of its rows."""
        return self.place.slots[: self.place.num_rows]

    def copy_rows(self, sources: Tensor, targets: Tensor, lengths: Tensor, longest: int) -> None:
        """Makes the first (N,) `lengths` tokens of N rows the contents of others; a row may be its own source.

        Args:
            longest: The largest of the lengths, which are on the device.
        """
        is_padding = _is_padding(lengths, longest)
        for layer in self.layers:
            assert isinstance(layer, RowLayer)
            if not layer.is_initialized:  # nothing was written yet
                continue
            for states in (layer.keys, layer.values):
                write_rows(states, targets, states[:, :, :longest].index_select(0, sources), is_padding)


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer, (B, num_key_value_heads, L, head_dim) each, allocated at the first update."""

    keys: Tensor
    values: Tensor
    is_sliding = False

    def __init__(self, num_rows: int, cache_length: int, place: Place) -> None:
        super().__init__()
        self.num_rows, self.cache_length, self.place = num_rows, cache_length, place

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether transformers must make a mask of a fixed size; prompts need none behind one another."""
        return self.place.prompt_rows is None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # type: ignore[override]
        self.keys, self.values = (
            states.new_zeros(self.num_rows, states.shape[1], self.cache_length, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of whole prompts, or of one token for each row of a step.

        Args:
            key_states: (N, num_key_value_heads, S, head_dim), S = 1 for single tokens.
            value_states: Of the same shape, up to the last dimension.

        Returns:
            The keys and values to attend to: those of the prompts, or the first slots of a step's rows, of which a mask
            must hide those that are not written yet.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self.place
        if place.prompt_rows is not None and place.is_padding is not None:
            write_rows(self.keys, place.prompt_rows, key_states, place.is_padding)
            write_rows(self.values, place.prompt_rows, value_states, place.is_padding)
            return key_states, value_states
        num_rows, reach = place.num_rows, place.reach
        rows, slots = place.row_ids[:num_rows], place.slots[:num_rows]
        self.keys[rows, :, slots] = key_states[:, :, 0]
        self.values[rows, :, slots] = value_states[:, :, 0]
        return self.keys[:num_rows, :, :reach], self.values[:num_rows, :, :reach]

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Returns the length and offset that transformers builds the prompts' mask with; a step brings its own mask.

        Args:
            query_length: The number of tokens; from transformers 4 their positions, (N,).
        """
        return (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self.place.prompt_rows is not None else self.place.reported_length  # a step brings its positions

    def get_max_length(self) -> int:
        return self.cache_length

    get_max_cache_shape = get_max_length


def _is_padding(lengths: Tensor, longest: int) -> Tensor:
    return torch.arange(longest, device=lengths.device) >= lengths[:, None]


def write_rows(cache: Tensor, rows: Tensor, states: Tensor, is_padding: Tensor) -> None:
    """Makes states the contents of some rows of a cache, and zeros what follows them there.

    Args:
        cache: (B, num_key_value_heads, L, head_dim).
        rows: (N,) int64, all different.
        states: (N, num_key_value_heads, S, head_dim).
        is_padding: (N, S) bool.
    """
    size = states.shape[2]
    cache[:, :, :size].index_copy_(0, rows, states.masked_fill(is_padding[:, None, :, None], 0))
    cache[:, :, size:].index_fill_(0, rows, 0)  # a mask hides what another left there, but not NaN
