"""The `forward` of model classes, kept from verl's `model.use_fused_kernels`.

That option replaces `forward` in the class itself, for the rest of the process, by one that returns no logits. Answers
need logits, so the original is remembered before the first replacement and given to copies of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from verl_valgen.patching import patched

_original_forwards: dict[type, Callable[..., Any]] = {}
"""Model classes that verl may have patched in this process, and the `forward` that each had before."""


@contextmanager
def forwards_remembered() -> Iterator[None]:
    """While open, the engine's patching of a model first remembers the `forward` of the model's class."""
    from verl.workers.engine.fsdp import transformer_impl

    patch_model = transformer_impl.apply_monkey_patch

    def apply_monkey_patch(model: Any, *args: Any, **kwargs: Any) -> Any:
        _original_forwards.setdefault(type(model), type(model).forward)
        return patch_model(model, *args, **kwargs)

    with patched(transformer_impl, "apply_monkey_patch", apply_monkey_patch):
        yield


def may_be_replaced(cls: type) -> bool:
    """Whether verl has patched models of this class."""
    return cls in _original_forwards


def with_original_forward(cls: Any) -> Any:
    """The class itself, or a subclass with the original `forward` if verl replaced it."""
    # Set on the model instead, the bound method would be a cycle, and the model's memory would not be free before a
    # garbage collection.
    forward = _original_forwards.get(cls, cls.forward)
    return cls if forward is cls.forward else type(cls.__name__, (cls,), {"forward": forward})
