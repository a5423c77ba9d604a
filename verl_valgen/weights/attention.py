"""Which attention a plain copy computes with: the trainer's own where torch alone serves it, else one that agrees."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

_OF_TORCH = ("eager", "sdpa")
# Gemma 2's `attn_logit_softcapping` and its kin, not `final_logit_softcapping`.
_SOFT_CAP = re.compile(r"^(?=.*att(n|ention))(?=.*(soft_?cap|logits?_cap))")


def with_torch_attention(config: PretrainedConfig, *, is_trained_with: bool = True) -> PretrainedConfig:
    """Copies a configuration, with attention that needs nothing but torch: its own if it does, else one that agrees.

    Args:
        is_trained_with: Whether the trainer computes with the attention that the configuration names. False where it is
            an engine with attention of its own, which leaves nothing out.

    Flash attention takes no float32, and verl patches it for sequence parallelism. What it computes sdpa computes too,
    but for soft-caps on the scores, which sdpa drops silently: there it is eager attention. (Attention sinks are
    dropped as well: classes that have them say that they do not support sdpa, and transformers chooses eager.)
    """
    config = copy.deepcopy(config)
    parts = list(_parts(config))
    # All are read before the first is set: a configuration passes it on to its parts.
    for part, trainers in [(part, part._attn_implementation) for part in parts]:
        if is_trained_with and trainers in _OF_TORCH:
            chosen = trainers
        else:
            chosen = "eager" if _has_soft_cap(part) else None  # None: sdpa where the class supports it, else eager
            if is_trained_with and trainers is not None:
                name = chosen or "transformers' default"
                logger.debug("attention of %s: %s in place of %s", type(part).__name__, name, trainers)
        part._attn_implementation = chosen
    return config


def _parts(config: Any) -> Iterator[Any]:
    """The configuration and those of its parts, each before its own parts."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            yield from _parts(part)


def _has_soft_cap(config: Any) -> bool:
    return any(value and _SOFT_CAP.search(name) for name, value in vars(config).items())
