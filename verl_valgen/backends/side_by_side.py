"""Which texts one forward pass may take, padded on the right. Tries nothing: what was found is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from verl_valgen.backends.batching import table_boundaries
from verl_valgen.backends.lengths import most_positions
from verl_valgen.backends.padding import Sharing
from verl_valgen.backends.sharing import known_sharing
from verl_valgen.backends.trial import model_key

_to_be_read_apart: set[str] = set()
"""The `model_key` of models whose texts are to be read one at a time, by `read_apart_from_now_on`."""


def may_be_read_together(model: Any, lengths: Sequence[int]) -> bool:
    """Whether one forward pass may take texts of these lengths, as far as the configuration tells and what was found.

    Where nobody has asked which prompts may share a batch, it is those of a model without a recurrent state.
    """
    sharing = known_sharing(model)
    if sharing is None:
        sharing = Sharing.NONE if getattr(model, "_is_stateful", False) else Sharing.ANY_LENGTHS
    if sharing >= Sharing.NONE or (sharing is Sharing.EQUAL_LENGTHS and len(set(lengths)) > 1):
        return False
    # The longest text decides which tables all of a batch are computed with.
    boundaries = [*table_boundaries(model.config), most_positions(model.config)]
    sides = {sum(length > boundary for boundary in boundaries) for length in lengths}
    return len(sides) == 1 and model_key(model) not in _to_be_read_apart


def read_apart_from_now_on(model: Any) -> None:
    """Remembers that texts which a model was to read together were read rightly only one at a time."""
    _to_be_read_apart.add(model_key(model))
