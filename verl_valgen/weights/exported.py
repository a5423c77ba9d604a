"""A plain copy that is filled by what an engine exports, under the names that checkpoints have.

A row of packed experts is put in its place as soon as all that it is made of has come: what is held beside the copy is
an expert, or the gates of a layer where an engine exports them before the rest; all of a layer's experts where their
conversion mixes them. Nothing here is collective.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from verl_valgen.text import OnceLogger
from verl_valgen.weights.conversions import Conversions
from verl_valgen.weights.plain_copy import PlainCopy
from verl_valgen.weights.routes import Route, convert
from verl_valgen.weights.slots import assign

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
_warnings = OnceLogger(logger)


@dataclass
class _Pending:
    """What has come of a conversion's sources: by name its pattern, and a copy."""

    route: Route
    sources: dict[str, tuple[str, Tensor]] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for _, tensor in self.sources.values())


@dataclass
class _Rows:
    """A packed tensor of the copy, and which of its rows are there."""

    tensor: Tensor
    done: set[int] = field(default_factory=set)


class ExportedCopy(PlainCopy):
    """As `PlainCopy`, but with the names and the layout of a checkpoint, or the model's own.

    Args:
        model: The result of `empty_from_config`.
        exporter: What the errors call the engine.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, exporter: str) -> None:
        super().__init__(model, device)
        self.exporter = exporter
        self.conversions = Conversions(model)
        self.pending: dict[tuple[tuple[str, ...], int | None], _Pending] = {}
        self.rows: dict[str, _Rows] = {}
        self.names: dict[str, None] = {}
        self.missing_buffers = dict.fromkeys(self.buffers)

    @property
    def num_pending_bytes(self) -> int:
        """The size of what is held beside the copy."""
        sources = (source for pending in self.pending.values() for source in pending.sources.values())
        return sum(tensor.numel() * tensor.element_size() for _, tensor in sources)

    def receive(self, name: str, parameter: Tensor) -> None:
        """Copies in one tensor as it was exported.

        Args:
            name: A checkpoint's, or the model's own; any of them where a parameter is tied.
            parameter: Whole, of any dtype, on any device. One expert, or all of a layer.

        Raises:
            ValueError: It has no place in the model. The message says the engine, the name, and the nearest name.
        """
        self.names[name] = None
        route = self.conversions.route(name, parameter.shape)
        if route is None:
            if self.conversions.fits_both_ways(name, parameter.shape):
                raise ValueError(f"{self.exporter} exports {name}, square, so that it could lie either way")
            if not self.conversions.is_ignored(name):
                raise self._has_no_place(name)
            logger.debug("%s exports %s, which transformers leaves out", self.exporter, name)
            return
        target = route.targets[0]
        shape = self.conversions.tensors[target].shape
        if route.row is not None and route.row >= shape[0]:
            raise ValueError(f"{self.exporter} exports {name}, but {target} of {self._class} has {shape[0]} experts")
        if route.converter is not None:
            self._convert(name, parameter, route)
        elif parameter.shape != (expected := shape if route.row is None else shape[1:]):
            problem = f"exports {name} as {tuple(parameter.shape)}, not as {tuple(expected)}"
            raise ValueError(f"{self.exporter} {problem}")
        else:
            self._put(target, parameter, route.row)

    def _convert(self, name: str, parameter: Tensor, route: Route) -> None:
        """Converts once the last of the sources has come: a conversion moves elements, and makes none."""
        shapes = {target: self.conversions.tensors[target].shape for target in route.targets}
        if route.row is not None:
            shapes = {target: shape[1:] for target, shape in shapes.items()}
        pending = self.pending.setdefault((route.targets, route.row), _Pending(route))
        pending.sources[name] = route.source_pattern, parameter.detach()
        if pending.numel < sum(shape.numel() for shape in shapes.values()):
            # Valid until the next one comes, and small as the copy has it.
            dtype = next((self.weights[t].slots[0].dtype for t in route.targets if t in self.weights), parameter.dtype)
            pending.sources[name] = route.source_pattern, self._converted(parameter, dtype)
            return
        del self.pending[route.targets, route.row]
        pending.sources[name] = route.source_pattern, parameter.detach().to(self.device)
        for target, value in self._made(pending).items():
            if _without_ones(value.shape) != _without_ones(shapes[target]):
                raise self._does_not_make(pending)
            self._put(target, value.reshape(shapes[target]), route.row)

    def _made(self, pending: _Pending) -> dict[str, Tensor]:
        try:
            return convert(pending.route, pending.sources, self.model)
        except Exception as e:
            empty = {name: (pattern, tensor.to("meta")) for name, (pattern, tensor) in pending.sources.items()}
            try:
                convert(pending.route, empty, self.model)
            except Exception:
                raise self._does_not_make(pending) from e
            raise  # memory, say

    def _put(self, name: str, value: Tensor, row: int | None) -> None:
        if row is None:
            super().receive(name, value)
            self.missing_buffers.pop(name, None)
            return
        weight = self.weights[name]
        if name not in self.rows:
            slot = weight.slots[0]
            self.rows[name] = _Rows(torch.empty(slot.parameter.shape, dtype=slot.dtype, device=self.device))
        rows = self.rows[name]
        rows.tensor[row].copy_(value.detach())
        rows.done.add(row)
        if len(rows.done) == len(rows.tensor) and not weight.is_received:
            weight.is_received = True
            assign(weight.slots, rows.tensor)

    def finish(self) -> PreTrainedModel:
        """Returns the filled model in eval mode.

        Raises:
            RuntimeError: A parameter was never received, or not all of it. The message says the engine, the name, and
                the nearest name that has come.
        """
        missing = sorted(name for name, weight in self.weights.items() if not weight.is_received)
        if missing:
            others = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
            raise RuntimeError(f"{self.exporter} did not export {self._what_is_missing(missing[0])}{others}")
        if self.missing_buffers:  # some engines have none, and compute without; some buffers are made with the model
            first, *rest = self.missing_buffers
            others = f", nor {len(rest)} others" if rest else ""
            _warnings.warn(
                f"{self.exporter} did not export the buffer {first} of {self._class}{others}: the answers are made "
                "with what a new model has there"
            )
        return super().finish()

    def _what_is_missing(self, name: str) -> str:
        of = f"{name} of {self._class}"
        for pending in self.pending.values():
            if name in pending.route.targets:
                return f"all that makes {of}: {next(iter(pending.sources))} came without what belongs to it"
        if name in self.rows:
            rows = self.rows[name]
            row = next(row for row in range(len(rows.tensor)) if row not in rows.done)
            return f"expert {row} ({len(rows.done)} of {len(rows.tensor)} came) of {of}"
        return f"{of}{_nearest(name, list(self.names))}"

    def _has_no_place(self, name: str) -> ValueError:
        nearest = _nearest(name, self.conversions.names())
        return ValueError(f"{self.exporter} exports {name}, which has no place in {self._class}{nearest}")

    def _does_not_make(self, pending: _Pending) -> ValueError:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, (_, tensor) in [*pending.sources.items()][:4])
        return ValueError(f"{self.exporter} exports {shapes}, which do not make {pending.route.targets[0]}")

    @property
    def _class(self) -> str:
        return type(self.model).__name__


def _nearest(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"; the nearest name is {found[0]}" if found else ""


def _without_ones(shape: torch.Size) -> list[int]:
    """A conversion may leave out, or add, dimensions of size 1."""
    return [size for size in shape if size != 1]
