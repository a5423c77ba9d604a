"""Generation backends by name. A new one is a module here and a line in `BACKENDS`."""

from __future__ import annotations

from importlib import import_module

from verl_valgen.backends.base import Backend

BACKENDS = {"hf": "verl_valgen.backends.hf:HFBackend"}
"""Name -> "module:class", imported when it is asked for."""


def backend_class(name: str) -> type[Backend]:
    """The class behind `generation.backend`; "auto" is the best that runs here."""
    module, _, attribute = BACKENDS["hf" if name == "auto" else name].partition(":")
    return getattr(import_module(module), attribute)
