"""A plain Hugging Face model: built empty in the likeness of another or from a configuration, filled tensor by tensor.

This module knows how FSDP and PEFT change a model's structure and names, and how to undo both. It does not know how a
parameter is gathered, and nothing in it is collective.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Wrappers that show up in parameter names: FSDP1, and torch's activation checkpointing.
_WRAPPER_PREFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class PlainCopy:
    """A model whose parameters have no storage at first, and that is filled parameter by parameter.

    Args:
        model: What `empty_like` or `empty_from_config` gives; becomes the copy.
        source: The model that it is the likeness of, None if it is nobody's: the tensors that are not parameters come
            from there.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device, *, source: nn.Module | None = None
    ) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.source = model if source is None else source
        # A tied parameter has several names and several places, and is stored once.
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        self.buffers: dict[str, tuple[nn.Module, str]] = {}
        for prefix, module in self.model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    shared = places.setdefault(id(parameter), [])
                    shared.append((module, name))
                    self.places[f"{prefix}.{name}".removeprefix(".")] = shared
            for name in module._buffers.keys() - module._non_persistent_buffers_set:
                self.buffers[f"{prefix}.{name}".removeprefix(".")] = (module, name)
        self.tuner_layers = tuner_layers(self.model)

    @property
    def num_bytes(self) -> int:
        """Size of the parameters once they are here."""
        return sum(parameter.numel() for parameter in self.model.parameters()) * self.dtype.itemsize

    def receive(self, name: str, parameter: Tensor) -> None:
        """Copies one whole parameter in; merges a PEFT layer as soon as all of its parameters are there.

        Raises:
            KeyError: The model has no parameter or buffer of this name.
        """
        if name not in self.places:  # a state dict has both
            module, attribute = self.buffers[name]
            module._buffers[attribute] = parameter.detach().to(device=self.device, copy=True)
            return
        places = self.places[name]
        if not any(getattr(module, attribute).is_meta for module, attribute in places):
            return  # tied, and here already under its other name
        layer = self.tuner_layers.get(name)
        merged_in = set() if layer is None else {id(module) for module in layer.modules()}
        # What a PEFT layer will merge stays in float32 and is not shared: a weight tied to it must not change.
        for group, dtype in (
            ([place for place in places if id(place[0]) not in merged_in], self.dtype),
            ([place for place in places if id(place[0]) in merged_in], torch.float32),
        ):
            if group:
                dtype = dtype if parameter.is_floating_point() else parameter.dtype
                value = parameter.detach().to(device=self.device, dtype=dtype, copy=True)
                _place(nn.Parameter(value, requires_grad=False), group)
        if layer is not None and not any(p.is_meta for p in layer.parameters()):
            layer.merge()
            for p in layer.get_base_layer().parameters():
                p.data = p.data.to(self.dtype)

    def finish(self) -> PreTrainedModel:
        """The filled model, without PEFT, in eval mode."""
        missing = sorted(name for name, places in self.places.items() if getattr(*places[0]).is_meta)
        if missing:
            raise RuntimeError(f"{len(missing)} parameters were not gathered, {missing[0]} first")
        self._copy_tensors_that_are_not_parameters()
        model: Any = self.model
        if hasattr(model, "peft_config"):
            model = model.unload()
        return model.requires_grad_(False).eval()

    def _copy_tensors_that_are_not_parameters(self) -> None:
        # Rotary tables are buffers that no state dict holds, and the originals beside them plain attributes.
        modules = dict(self.model.named_modules())
        # (Where nobody is the source, they are moved to the device.)
        for name, source in self.source.named_modules():
            target = modules.get(clean_name(name + ".").removesuffix("."))
            if target is None:
                continue
            for key, buffer in source._buffers.items():
                if buffer is not None and key in target._buffers:
                    cast = buffer.is_floating_point() and key not in source._non_persistent_buffers_set
                    dtype = self.dtype if cast else buffer.dtype
                    target._buffers[key] = buffer.detach().to(device=self.device, dtype=dtype, copy=True)
            for key, value in tensor_attributes(source).items():
                if not value.is_meta and key not in target._parameters:
                    setattr(target, key, value.detach().to(device=self.device, copy=True))


def unwrap(wrapped: nn.Module) -> nn.Module:
    """The model inside FSDP1's wrapper; FSDP2 has none."""
    return wrapped.module if isinstance(wrapped, FSDP) else wrapped


def base_model(source: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return source.get_base_model() if hasattr(source, "get_base_model") else source


def original_class(model: nn.Module) -> type[PreTrainedModel]:
    """The class as it was before FSDP2 put a subclass in its place."""
    classes: Any = type(model).__mro__
    return next(cls for cls in classes if not issubclass(cls, FSDPModule))


def clean_name(name: str) -> str:
    """A parameter's or module's name without the wrappers' parts."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """The PEFT layer of each parameter that PEFT merges, base weight or adapter, by the parameter's clean name."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer_class: Any = BaseTunerLayer  # a mixin of modules, not itself one
    return {
        clean_name(f"{prefix}.{name}"): module
        for prefix, module in model.named_modules()
        if isinstance(module, layer_class)
        for name, _ in module.named_parameters()
    }


def empty_like(source: Any) -> nn.Module:
    """A new model of the source's structure, all on the meta device: nothing is initialised there.

    Args:
        source: A transformers model, or a PEFT model around one; sharded in any way. Its parameters are not read.
    """
    base = base_model(source)
    cls = original_class(base)
    with torch.device("meta"):
        model = cls(_with_plain_attention(base.config, cls))
        if base is source:
            return model

        from peft import PeftModel

        peft_model: Any = None
        for adapter, peft_config in source.peft_config.items():
            peft_config = copy.deepcopy(peft_config)
            if hasattr(peft_config, "init_lora_weights"):
                peft_config.init_lora_weights = False  # some initialisations decompose the weights, which are not there
            if peft_model is None:
                peft_model = PeftModel(model, peft_config, adapter)
            else:
                peft_model.add_adapter(adapter, peft_config)
    peft_model.base_model.set_adapter(source.active_adapters)
    return peft_model


def empty_from_config(auto_class: Any, config: PretrainedConfig, **kwargs: Any) -> nn.Module:
    """A new model with its parameters on the meta device, and its buffers (rotary tables) computed, in host memory.

    Args:
        auto_class: One of transformers' `AutoModelFor...`.
        kwargs: For its `from_config`.
    """
    from accelerate import init_empty_weights  # verl depends on it

    config = copy.deepcopy(config)
    config._attn_implementation = None  # transformers' choice, not the trainer's: see `_with_plain_attention`
    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(config, **kwargs)
    model.tie_weights()  # accelerate has parted the tied ones
    return model


def _with_plain_attention(config: PretrainedConfig, cls: Any) -> PretrainedConfig:
    """A copy without the trainer's attention: flash attention takes no float32, and verl patches it for sequence
    parallelism."""
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
    return config


def _place(parameter: nn.Parameter, places: list[tuple[nn.Module, str]]) -> None:
    for module, attribute in places:
        module._parameters[attribute] = parameter


def tensor_attributes(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that a module holds as plain attributes, neither parameters nor buffers."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
