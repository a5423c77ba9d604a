"""Whether verl's trainers can have the attention that they ask for. Both ask for flash-attn."""

from __future__ import annotations

import importlib
import logging

logger = logging.getLogger(__name__)


def flash_attn_works() -> bool:
    """Says so where it does not: the model is then loaded with transformers' own attention."""
    # An installed build may have been made for another torch: only the import tells.
    try:
        importlib.import_module("flash_attn")
    except Exception:
        logger.info("flash-attn cannot be imported: the model is loaded with transformers' default attention (sdpa)")
        return False
    return True
