"""Builds transformers models without their weights: of another model's structure, or from a configuration.

Every tensor has the dtype that `from_pretrained(dtype=...)` would give it. A constructor's random numbers leave torch's
random state as it was.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from verl_valgen.text import describe
from verl_valgen.weights.adapters import peft_type, require_mergeable, with_adapters
from verl_valgen.weights.attention import with_torch_attention
from verl_valgen.weights.dtypes import default_dtype, keep_in_float32, set_config_dtype
from verl_valgen.weights.structure import base_model, named_modules, original_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


def empty_like(source: Any, dtype: torch.dtype) -> nn.Module:
    """Builds a model of the source's structure with its parameters on the meta device.

    Args:
        source: A transformers model, or a PEFT model around one, sharded in any way. Its parameters are not read.
        dtype: The one that is asked for, as in `from_pretrained`; adapters have a dtype of their own.

    Returns:
        A model of the class that the source had before sharding, or a PEFT model around one. Buffers lie on the meta
        device, or, where the class's constructor needs values, in host memory. See `_parameters_on_meta` and `_on_cpu`
        for the host memory that takes.

    Raises:
        Exception: What the constructor raised.
        NotImplementedError: An adapter of a type that cannot be merged.
    """
    base = base_model(source)
    cls: Any = original_class(base)
    config = with_torch_attention(base.config)
    set_config_dtype(config, dtype)

    def build() -> nn.Module:
        return _build(lambda: cls(copy.deepcopy(config)), dtype, (_all_on_meta, _parameters_on_meta, _on_cpu))

    if base is not source:
        return _build_with_adapters(build, source)
    if hasattr(source, "peft_config"):
        raise NotImplementedError("adapters that are in the model without PEFT's model around it cannot be merged")
    return build()


def _build_with_adapters(build: Callable[[], nn.Module], source: Any) -> nn.Module:
    require_mergeable(source)
    modules = named_modules(source)
    with torch.random.fork_rng(devices=[]):
        base = build()
        try:
            with torch.device("meta"):
                return with_adapters(base, source, modules)
        except Exception as e:
            logger.debug("the adapters cannot be built on the meta device: %s", describe(e))
        base = build()  # a part of the adapters may be in the first
        try:
            return with_adapters(base, source, modules)
        except Exception as e:
            types = ", ".join(sorted({peft_type(peft_config) for peft_config in source.peft_config.values()}))
            raise NotImplementedError(f"{types} cannot be rebuilt around a model without weights") from e


def empty_from_config(auto_class: Any, config: PretrainedConfig, dtype: torch.dtype, **kwargs: Any) -> nn.Module:
    """Builds a model with its parameters on the meta device and its buffers (rotary tables) computed, in host memory.

    Args:
        auto_class: One of transformers' `AutoModelFor...`.
        config: Left as it is; the attention that it names is not used.
        dtype: The one that is asked for, as in `from_pretrained`.
        kwargs: Passed to the class's `from_config`.
    """
    config = with_torch_attention(config, is_trained_with=False)
    set_config_dtype(config, dtype)
    model: Any = _build(lambda: auto_class.from_config(config, **kwargs), dtype, (_parameters_on_meta, _on_cpu))
    return model


def _build(make: Callable[[], Any], dtype: torch.dtype, ways: tuple[Callable[[], Any], ...]) -> nn.Module:
    """Returns what `make` makes in the first of these ways in which it raises nothing."""
    for way in ways:
        try:
            with torch.random.fork_rng(devices=[]), default_dtype(dtype), way():
                model = make()
        except Exception as e:
            if way is ways[-1]:
                raise
            logger.debug("the model cannot be built %s: %s", str(way.__doc__).partition(".")[0], describe(e))
            continue
        if way is not _all_on_meta or not _hides_meta_tensors(model):
            break
        logger.debug("the model keeps tensors that cannot be copied on the meta device: it is built again")
    if way is not _all_on_meta:
        model.tie_weights()  # accelerate has made two parameters of a tied one
    _move_parameters_to_meta(model)
    keep_in_float32(model, dtype)
    return model


@contextmanager
def _all_on_meta() -> Iterator[None]:
    """on the meta device. Takes no memory but for tensors whose constructor takes no notice of it."""
    with _NothingDrawnOnMeta(), torch.device("meta"):  # transformers looks for the innermost
        yield


class _NothingDrawnOnMeta(TorchFunctionMode):
    """While open, this thread draws no values for tensors that have none, up to 3/4 of a constructor's time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWING or getattr(func, "__module__", None) == nn.init.__name__:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


_DRAWING = {Tensor.normal_, Tensor.uniform_}
"""What initialisers call, beside those of `torch.nn.init`: each gives the tensor back that it is given."""


def _parameters_on_meta() -> AbstractContextManager[Any]:
    """with its parameters on the meta device. Takes host memory for the buffers, and for one parameter at a time."""
    from accelerate import init_empty_weights  # verl depends on it

    return init_empty_weights(include_buffers=False)


@contextmanager
def _on_cpu() -> Iterator[None]:
    """on the CPU. Takes host memory for the whole model, in the dtype asked for, until it is built."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights
    with torch.device("cpu"), no_init_weights():
        yield


def _move_parameters_to_meta(model: nn.Module) -> None:
    """A constructor that takes no notice of the meta device, as with `torch.normal`, has left values of its own."""
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = new.setdefault(id(parameter), nn.Parameter(parameter.to("meta"), requires_grad=False))
                module._parameters[name] = empty


def _hides_meta_tensors(model: nn.Module) -> bool:
    """Whether a module holds, in a list or the like, tensors without values, which nothing would ever fill."""
    return any(
        isinstance(value, list | tuple | dict) and any(tensor.is_meta for tensor in _tensors_in(value))
        for module in model.modules()
        for name, value in vars(module).items()
        if not name.startswith("_")
    )


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)
