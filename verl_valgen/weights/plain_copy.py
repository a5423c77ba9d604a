"""A plain Hugging Face model, built empty from another model's structure or a configuration and filled by tensors.

This module knows how FSDP and PEFT change a model's structure and names, and how to undo both; structure and filling
stay in one file, as one undoes what the other finds. It does not know how a parameter is gathered, and nothing in it is
collective.
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


Slot = tuple[nn.Module, str]
"""A module, and the name of one of its parameters or buffers."""


class PlainCopy:
    """A model that begins with its parameters on the meta device and is filled one whole parameter at a time.

    Args:
        model: The result of `empty_like` or `empty_from_config`; becomes the copy.
        dtype: The dtype of the copy's floating-point parameters.
        device: Where the copy lies.
        source: The model that was given to `empty_like`, from which tensors that are not parameters are copied. With
            None they stay as the model was built.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device, *, source: nn.Module | None = None
    ) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.source = model if source is None else source
        # A tied parameter has several names and as many slots, and is stored once.
        slots_by_id: dict[int, list[Slot]] = {}
        self.parameter_slots: dict[str, list[Slot]] = {}
        self.buffer_slots: dict[str, Slot] = {}
        for prefix, module in self.model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    slots = slots_by_id.setdefault(id(parameter), [])
                    slots.append((module, name))
                    self.parameter_slots[f"{prefix}.{name}".removeprefix(".")] = slots
            for name in module._buffers.keys() - module._non_persistent_buffers_set:
                self.buffer_slots[f"{prefix}.{name}".removeprefix(".")] = (module, name)
        self.tuner_layers = tuner_layers(self.model)

    @property
    def num_bytes(self) -> int:
        """The size of the parameters once all have been received."""
        return sum(parameter.numel() for parameter in self.model.parameters()) * self.dtype.itemsize

    def receive(self, name: str, parameter: Tensor) -> None:
        """Copies in one whole parameter or buffer, and merges a PEFT layer as soon as all of its parameters are there.

        Args:
            name: Without the wrappers' parts; any of its names where a parameter is tied.
            parameter: Of any dtype, on any device.

        Raises:
            KeyError: The model has no parameter or buffer of this name.
        """
        if name not in self.parameter_slots:  # a state dict holds buffers too
            module, attribute = self.buffer_slots[name]
            module._buffers[attribute] = parameter.detach().to(device=self.device, copy=True)
            return
        slots = self.parameter_slots[name]
        if not any(getattr(module, attribute).is_meta for module, attribute in slots):
            return  # tied, and already received under another name
        layer = self.tuner_layers.get(name)
        merging = set() if layer is None else {id(module) for module in layer.modules()}
        # What a PEFT layer will merge stays in float32 and is not shared: a weight tied to it must not change.
        for group, dtype in (
            ([slot for slot in slots if id(slot[0]) not in merging], self.dtype),
            ([slot for slot in slots if id(slot[0]) in merging], torch.float32),
        ):
            if group:
                dtype = dtype if parameter.is_floating_point() else parameter.dtype
                value = parameter.detach().to(device=self.device, dtype=dtype, copy=True)
                shared = nn.Parameter(value, requires_grad=False)
                for module, attribute in group:
                    module._parameters[attribute] = shared
        if layer is not None and not any(p.is_meta for p in layer.parameters()):
            layer.merge()
            for p in layer.get_base_layer().parameters():
                p.data = p.data.to(self.dtype)

    def finish(self) -> PreTrainedModel:
        """Returns the filled model, without PEFT's layers, in eval mode.

        Raises:
            RuntimeError: A parameter was never received; the message names it.
        """
        missing = sorted(name for name, slots in self.parameter_slots.items() if getattr(*slots[0]).is_meta)
        if missing:
            raise RuntimeError(f"{len(missing)} parameters were not gathered, {missing[0]} first")
        self._copy_tensors_that_are_not_parameters()
        model: Any = self.model
        if hasattr(model, "peft_config"):
            model = model.unload()
        return model.requires_grad_(False).eval()

    def _copy_tensors_that_are_not_parameters(self) -> None:
        # Rotary tables are buffers that no state dict holds, their originals (`original_inv_freq`) not even buffers.
        # Without a source the model is its own: its tables are brought to the device.
        modules = dict(self.model.named_modules())
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
    """Takes off FSDP1's wrapper; FSDP2 has none, so that its models come back as they are."""
    return wrapped.module if isinstance(wrapped, FSDP) else wrapped


def base_model(source: Any) -> PreTrainedModel:
    """Returns the transformers model inside a PEFT model, or the model itself if it is none."""
    return source.get_base_model() if hasattr(source, "get_base_model") else source


def original_class(model: nn.Module) -> type[PreTrainedModel]:
    """Returns the model's class as it was before FSDP2 replaced it by a subclass."""
    classes: Any = type(model).__mro__
    return next(cls for cls in classes if not issubclass(cls, FSDPModule))


def clean_name(name: str) -> str:
    """Removes the wrappers' parts from the name of a parameter or a module."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Maps the clean name of every parameter that PEFT merges, base weight or adapter, to its PEFT layer.

    Empty for a model without PEFT.
    """
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
    """Builds a model of the source's structure, all on the meta device, where nothing is initialised.

    Args:
        source: A transformers model, or a PEFT model around one, sharded in any way. Its parameters are not read.

    Returns:
        A model of the class that the source had before sharding, or a PEFT model around one.
    """
    base = base_model(source)
    cls = original_class(base)
    with torch.device("meta"):
        model = cls(_with_torch_attention(base.config, cls))
        if base is source:
            return model

        from peft import PeftModel

        peft_model: Any = None
        for adapter, peft_config in source.peft_config.items():
            peft_config = copy.deepcopy(peft_config)
            if hasattr(peft_config, "init_lora_weights"):
                peft_config.init_lora_weights = False  # some decompose the weights, which are not there yet
            if peft_model is None:
                peft_model = PeftModel(model, peft_config, adapter)
            else:
                peft_model.add_adapter(adapter, peft_config)
    peft_model.base_model.set_adapter(source.active_adapters)
    return peft_model


def empty_from_config(auto_class: Any, config: PretrainedConfig, **kwargs: Any) -> nn.Module:
    """Builds a model with its parameters on the meta device and its buffers (rotary tables) computed, in host memory.

    Args:
        auto_class: One of transformers' `AutoModelFor...`.
        config: Left as it is; the attention that it names is not used.
        kwargs: Passed to the class's `from_config`.
    """
    from accelerate import init_empty_weights  # verl depends on it

    config = copy.deepcopy(config)
    config._attn_implementation = None  # transformers chooses; see `_with_torch_attention`
    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(config, **kwargs)
    model.tie_weights()  # accelerate has made two parameters of a tied one
    return model


def _with_torch_attention(config: PretrainedConfig, cls: Any) -> PretrainedConfig:
    """Copies a configuration with torch's own attention in place of the trainer's.

    Flash attention takes no float32, and verl patches it for sequence parallelism.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
    return config


def tensor_attributes(module: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors that a module holds as mere attributes, neither parameters nor buffers, by name."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
