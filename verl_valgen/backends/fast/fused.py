"""Puts fused modules in the place of a model's own where they are proven to give the same, and takes them out again.

Every module that is replaced is proven on what the model itself passes to it: prompts with padding behind one, then
single tokens with a mask and a cache. For our own copies only. modules.py and fused_attention.py have what replaces
them, counterparts.py says which could be replaced.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl_valgen.backends.fast.counterparts import maker
from verl_valgen.backends.fast.decoded import decoded_logits
from verl_valgen.backends.fast.modules import FusedNorm
from verl_valgen.backends.trial import NUM_STEPS

Proven = Set[tuple[str, type]]
"""Name and class of the modules whose fused counterparts give the same."""

_REPLACED = "replaced"
"""Where a fused module keeps the original: in its `__dict__`, as a child would be a part of the model."""


class _Slot(NamedTuple):
    """A module that has a fused counterpart."""

    name: str
    parent: nn.Module
    attribute: str
    make: Callable[[Any], nn.Module]

    @property
    def module(self) -> nn.Module:
        return getattr(self.parent, self.attribute)


@torch.no_grad()
def fuse(
    model: PreTrainedModel, run: Callable[[], object] | None = None, known: Proven | None = None
) -> frozenset[tuple[str, type]]:
    """Replaces norms, MLPs and attention of an unsharded model in place, where the result is the same.

    Peak memory above the level before: the joined weights of one layer. The originals stay, with their weights as
    parts of the joined ones, for `unfuse`.

    Args:
        run: Runs the model over a few tokens with a `RowCache`, for the proof. None for one that does.
        known: What an earlier call returned for a model of the same configuration; then nothing is run.

    Returns:
        What was replaced.
    """
    slots = [
        _Slot(f"{prefix}.{attribute}", parent, attribute, make)
        for prefix, parent in model.named_modules()
        for attribute, child in parent.named_children()
        if (make := maker(child)) is not None
    ]
    if known is None:
        slots = _proven(slots, run or (lambda: decoded_logits(model, _sequences(model))))
    else:
        slots = [slot for slot in slots if (slot.name, type(slot.module)) in known]
    # Norms first: the replacement of an attention takes over the norms that are within it.
    for slot in sorted(slots, key=lambda slot: slot.make is not FusedNorm):
        module = slot.module
        replacement = slot.make(module)
        vars(replacement)[_REPLACED] = module
        setattr(slot.parent, slot.attribute, replacement)
    return frozenset((slot.name, type(vars(slot.module)[_REPLACED])) for slot in slots)


def unfuse(module: nn.Module) -> None:
    """Puts back what `fuse` has replaced in a model, with the same values and without a copy of them."""
    for name, child in module.named_children():
        original = vars(child).get(_REPLACED)
        if original is not None:
            setattr(module, name, original)
        unfuse(child if original is None else original)


def is_fused(model: nn.Module) -> bool:
    return any(_REPLACED in vars(module) for module in model.modules())


class _Proof:
    """Watches the calls of a module and compares its results with those of the fused one."""

    def __init__(self, make: Callable[[Any], nn.Module], module: nn.Module) -> None:
        self.make = make
        self.fused: nn.Module | None = None
        self.is_same: Tensor | bool = True
        self.hook = module.register_forward_hook(self.compare, with_kwargs=True)

    def compare(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.is_same is False:
            return
        try:
            self.fused = self.fused or self.make(module)
            actual = self.fused(*args, **kwargs)  # what it writes into the cache is what is there
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a class that we do not know may pass anything
            self.is_same = False
            return
        self.is_same = _is_same(output, actual) & self.is_same


def _proven(slots: list[_Slot], run: Callable[[], object]) -> list[_Slot]:
    """Returns the slots whose modules are called during `run` and give the same every time when fused.

    None of them where `run` fails.
    """
    proofs = [_Proof(slot.make, slot.module) for slot in slots]
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # a model that does not know our cache
        traceback.clear_frames(e.__traceback__)
        return []
    finally:
        for proof in proofs:
            proof.hook.remove()
    return [slot for slot, proof in zip(slots, proofs, strict=True) if proof.fused is not None and bool(proof.is_same)]


def _is_same(expected: Any, actual: Any) -> Tensor | bool:
    """Compares outputs: equal up to the rounding of a few operations in their dtype. Waits for no device.

    Padding may give NaN, where attention sees nothing; then both must.
    """
    expected, actual = (output[0] if isinstance(output, tuple) else output for output in (expected, actual))
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    tolerance = max(8 * torch.finfo(expected.dtype).eps, 1e-4)
    both_nan = expected.isnan() & actual.isnan()
    expected, actual = (output.float().masked_fill(both_nan, 0) for output in (expected, actual))
    return (expected - actual).norm() <= tolerance * expected.norm()


def _sequences(model: Any) -> list[list[int]]:
    """Returns sequences for a proof where nobody has any: ids from the middle of the vocabulary, no special tokens."""
    middle = model.config.get_text_config().vocab_size // 2
    return [[middle + 7 * i % 23 for i in range(length + NUM_STEPS)] for length in (2, 8, 8)]
