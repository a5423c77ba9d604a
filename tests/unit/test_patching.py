from __future__ import annotations

from types import SimpleNamespace

import pytest

from verl_valgen.patching import patched


def test_what_was_there_is_back_even_after_an_error():
    target = SimpleNamespace(present=1)

    def fail() -> None:
        with patched(target, "present", 2), patched(target, "absent", 3):
            assert (target.present, target.absent) == (2, 3)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert vars(target) == {"present": 1}
