"""What FSDP, activation checkpointing and PEFT make of a model: its inner model, class, names, and tied parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp._flat_param import FlatParameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Wrappers that show up in parameter names: FSDP1, and torch's activation checkpointing.
_WRAPPER_PREFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


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


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Maps the clean names of a model's modules to them; a wrapper gives its name to what it wraps."""
    return {clean_name(f"{name}.").removesuffix("."): module for name, module in model.named_modules()}


def tensor_attributes(module: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors that a module holds as mere attributes, neither parameters nor buffers, by name."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Maps the clean name of every parameter to one that stands for all that are tied to it. Not collective.

    A configuration does not tell: transformers leaves untied what differs in a checkpoint, and PEFT unties what it
    trains. Under FSDP1 only tied parameters have an entry.
    """
    first_names: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not isinstance(parameter, FlatParameter):
            ties[clean_name(name)] = first_names.setdefault(id(parameter), clean_name(name))
    units = [module for module in model.modules() if isinstance(module, FSDP)]
    module_names = {id(module): clean_name(f"{name}.") for name, module in model.named_modules()} if units else {}
    for unit in units:
        for info in getattr(unit._flat_param, "_shared_param_infos", ()):
            first = module_names[id(info.prim_module)] + info.prim_param_name
            ties[module_names[id(info.module)] + info.param_name] = ties[first] = first
    return ties
