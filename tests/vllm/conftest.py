from __future__ import annotations

from importlib.machinery import PathFinder

import pytest
from end_to_end.trainer import Assets

# By its file: this folder has the same name, and its parent is on the path.
_SPEC = PathFinder.find_spec("vllm")
HAS_VLLM = _SPEC is not None and _SPEC.origin is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Assets:
    """In the place of those that the other folders' tests share."""
    from vllm_runs import write_assets

    return write_assets(tmp_path_factory.mktemp("assets"))
