"""Generation backends by name. A new one is a module here and a line in `BACKENDS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any, NamedTuple

from verl_valgen.backends.base import Backend, Limits
from verl_valgen.settings.checks import ConfigError

BACKENDS = {
    "hf": "verl_valgen.backends.hf:HFBackend",
    "fast": "verl_valgen.backends.fast.backend:FastBackend",
    "vllm": "verl_valgen.backends.vllm.backend:VLLMBackend",
}
"""Name -> "module:class"; the module is imported when the backend is asked for."""

REFUSALS = {"vllm": "verl_valgen.backends.vllm.refusals:refusals"}
"""Name -> "module:function" that says what a backend has not of a request's parameters. The others have all."""


class Way(NamedTuple):
    """A backend, and how much it may do for speed."""

    name: str
    """For people: "fast", "fast, unfused", "hf", "hf, one prompt at a time"."""
    backend: str
    """A key of `BACKENDS`."""
    fuse: bool = True
    one_at_a_time: bool = False
    is_engine: bool = False
    """Whether an engine of others answers, which keeps weights of its own. It is filled anew in every round, so that it
    is checked in every round; and where it fails the next way answers that round."""

    def within(self, limits: Limits) -> Limits:
        """Returns the limits with which the backend goes this way."""
        return replace(limits, fuse=self.fuse, one_at_a_time=self.one_at_a_time)


LOCKSTEP_BACKEND = "verl_valgen.backends.lockstep:LockstepBackend"
"""Answers through the sharded model, where all ranks take part: no backend that a user names."""
SHARDED = Way("the sharded model, one prompt at a time", LOCKSTEP_BACKEND, one_at_a_time=True)
"""The safest way, and the slowest: without a copy of the weights."""

_HF_WAYS = (Way("hf", "hf"), Way("hf, one prompt at a time", "hf", one_at_a_time=True))


def ways(name: str, device_type: str) -> list[Way]:
    """Returns the ways to answer, from the one that `generation.backend` asks for to the safest.

    Each does less that could go wrong with a model that nobody has tried.
    (`SHARDED`, which needs no copy of the weights, is not among them.)

    Args:
        name: As for `backend_class`.
        device_type: The type of a `torch.device`.
    """
    name = _resolved(name, device_type)
    if name == "vllm":
        return [Way(name, name, is_engine=True), *ways("auto", device_type)]
    if name == "hf":
        return list(_HF_WAYS)
    first = [Way(name, name)]
    if name == "fast" and device_type == "cuda":  # elsewhere nothing is fused
        first.append(Way("fast, unfused", name, fuse=False))
    return [*first, *_HF_WAYS]


def backend_class(name: str, device_type: str) -> type[Backend]:
    """Imports the class behind `generation.backend`.

    Args:
        name: A key of `BACKENDS`, or "auto" for the best on devices of this type: "fast" on CUDA and CPU, else "hf".
        device_type: The type of a `torch.device`.
    """
    return resolve_name(BACKENDS[_resolved(name, device_type)])


def check_parameters(name: str, params: Mapping[str, Any], source: str) -> None:
    """Refuses generation parameters that a backend does not have, before it is asked.

    Args:
        name: A key of `BACKENDS`, or "auto".
        params: `transformers.GenerationConfig` fields, checked.
        source: Where they come from, for the error.

    Raises:
        ConfigError: With a line for each.
    """
    lines = resolve_name(REFUSALS[name])(params) if name in REFUSALS else []
    if lines:
        prefix = "" if source == "generation" else f"{source}: "
        raise ConfigError("\n".join(prefix + line for line in lines))


def _resolved(name: str, device_type: str) -> str:
    if name == "auto":
        return "fast" if device_type in ("cuda", "cpu") else "hf"
    return name
