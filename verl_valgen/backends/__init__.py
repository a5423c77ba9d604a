"""Generation backends by name. A new one is a module here and a line in `BACKENDS`."""

from __future__ import annotations

from pkgutil import resolve_name

from verl_valgen.backends.base import Backend

BACKENDS = {
    "hf": "verl_valgen.backends.hf:HFBackend",
    "fast": "verl_valgen.backends.fast.backend:FastBackend",
}
"""Name -> "module:class"; the module is imported when the backend is asked for."""


def backend_class(name: str, device_type: str) -> type[Backend]:
    """Imports the class behind `generation.backend`.

    Args:
        name: A key of `BACKENDS`, or "auto" for the best on devices of this type: "fast" on CUDA, "hf" elsewhere.
        device_type: The type of a `torch.device`.
    """
    if name == "auto":
        name = "fast" if device_type == "cuda" else "hf"
    return resolve_name(BACKENDS[name])
