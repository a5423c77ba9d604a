"""Generation backends by name. A new one is a module here and a line in `BACKENDS`."""

from __future__ import annotations

from importlib import import_module

from verl_valgen.backends.base import Backend

BACKENDS = {"hf": "verl_valgen.backends.hf:HFBackend", "fast": "verl_valgen.backends.fast.backend:FastBackend"}
"""Name -> "module:class", imported when it is asked for."""


def backend_class(name: str, device_type: str) -> type[Backend]:
    """The class behind `generation.backend`; "auto" is the best on devices of this type."""
    if name == "auto":
        name = "fast" if device_type == "cuda" else "hf"
    module, _, attribute = BACKENDS[name].partition(":")
    return getattr(import_module(module), attribute)
