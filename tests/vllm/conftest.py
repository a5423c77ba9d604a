from __future__ import annotations

from importlib.machinery import PathFinder

# By its file: this folder has the same name, and its parent is on the path.
_SPEC = PathFinder.find_spec("vllm")
HAS_VLLM = _SPEC is not None and _SPEC.origin is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]
