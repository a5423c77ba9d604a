"""PEFT's adapters: rebuilding their structure around an empty model, merging them, and taking them off.

What counts is the PEFT model's own forward pass: the plain model must compute the same. Where it cannot, that is an
error which names the adapter's type.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-2  # relative; float32 on CUDA may be TF32
# What an adapter's layer knows beside its tensors: its factor, whether it is switched off, which adapters are in use,
# and which are in the weights already.
_STATE = ("scaling", "_disable_adapters", "_active_adapter", "merged_adapters")


def with_adapters(model: nn.Module, source: Any, source_modules: Mapping[str, nn.Module]) -> nn.Module:
    """Puts the structure of a PEFT model's adapters around an empty model, in the state in which they are there.

    Args:
        model: A model like the one inside the source; it is changed.
        source: A PEFT model, sharded in any way. Its parameters are not read.
        source_modules: Its modules by their clean names.
    """
    from peft import PeftMixedModel, PeftModel

    peft_model: Any = None
    for adapter, peft_config in source.peft_config.items():
        peft_config = copy.deepcopy(peft_config)
        if hasattr(peft_config, "init_lora_weights"):
            peft_config.init_lora_weights = False  # some decompose the weights, which are not there yet
        if peft_model is None:
            peft_class = PeftMixedModel if isinstance(source, PeftMixedModel) else PeftModel
            peft_model = peft_class(model, peft_config, adapter)
        else:
            peft_model.add_adapter(adapter, peft_config)
    for name, target in peft_model.named_modules():
        state = vars(source_modules.get(name, target))
        if "_active_adapter" in state:
            target.__dict__.update({key: copy.deepcopy(state[key]) for key in _STATE if key in state})
    return peft_model


def require_mergeable(source: Any) -> None:
    """Raises NotImplementedError where an adapter of a PEFT model is of a type that has no part in the weights."""
    for peft_config in source.peft_config.values():
        if peft_config.is_prompt_learning or getattr(peft_config, "is_adaption_prompt", False):
            raise NotImplementedError(f"{peft_type(peft_config)} adds to the prompt, and cannot be merged into weights")


def outermost_layers(model: nn.Module) -> list[Any]:
    """The layers that adapters are merged in. One may have others inside (several fused experts): they go together.

    Empty for a model without PEFT.
    """
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer_class: Any = BaseTunerLayer  # a mixin of modules, not itself one
    layers: list[Any] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if not isinstance(child, layer_class):
                visit(child)
            elif child not in layers:
                layers.append(child)

    visit(model)
    return layers


def merge(outermost: Any) -> list[Any]:
    """Merges the adapters in use of a layer, and of those inside it, with PEFT's own `merge`.

    All of its parameters must be there, in float32, the base layer's not shared with any other; the layer in eval mode.

    Returns:
        The modules that had to be given a bias, in their weight's dtype.

    Raises:
        NotImplementedError: An adapter cannot be merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer_class: Any = BaseTunerLayer
    with_new_bias = []
    base = outermost.get_base_layer()
    probe = _probe(base)
    expected = None if probe is None else outermost(probe)
    for layer in [module for module in outermost.modules() if isinstance(module, layer_class)]:
        if layer.disable_adapters:
            continue
        adapters = {name for key in layer.adapter_layer_names for name in _keys(getattr(layer, key, None))}
        active = [name for name in layer.active_adapters if name in adapters]
        if _needs_bias(layer, active):
            biased = layer.get_base_layer()
            bias = torch.zeros(layer.out_features, dtype=biased.weight.dtype, device=biased.weight.device)
            biased.bias = nn.Parameter(bias, requires_grad=False)
            with_new_bias.append(biased)
        layer.merge()
        if not set(active) <= set(layer.merged_adapters):
            raise NotImplementedError(f"{_name(layer)} does not merge its adapters")
    if expected is not None and (base(probe) - expected).abs().max() > _TOLERANCE * expected.abs().max():
        raise NotImplementedError(f"{_name(outermost)} does not compute the same once its adapters are merged")
    return with_new_bias


def _probe(base: Any) -> Tensor | None:
    """An input for a layer that PEFT has put adapters on; None if it is of a kind that is not known.

    Raises:
        NotImplementedError: The layer is another of PEFT's, which hides the weight.
    """
    if "_active_adapter" in vars(base):
        raise NotImplementedError(f"{_name(base)} inside another adapter cannot be merged")
    if not isinstance(weight := getattr(base, "weight", None), Tensor) or weight.dim() != 2:
        return None
    num_rows, num_columns = weight.shape
    if isinstance(base, nn.Embedding):
        return torch.arange(0, num_rows, 1 + num_rows // 64, device=weight.device)
    size = {"Linear": num_columns, "Conv1D": num_rows}.get(type(base).__name__)
    return None if size is None else torch.arange(size, dtype=weight.dtype, device=weight.device).cos()[None]


def _keys(container: Any) -> list[str]:
    return list(container.keys()) if hasattr(container, "keys") else []


def _needs_bias(layer: Any, active: list[str]) -> bool:
    """PEFT merges an adapter's bias into the base layer's, and refuses where there is none."""
    with_bias: dict[str, bool] = getattr(layer, "lora_bias", {})
    return any(with_bias.get(name) for name in active) and getattr(layer.get_base_layer(), "bias", None) is None


def without_adapters(model: Any) -> Any:
    """Takes off PEFT's layers, whose adapters have been merged where they are in use."""
    if not hasattr(model, "peft_config"):
        return model
    for name, module in list(model.named_modules()):
        # PEFT would put the trained module in its place even where adapters are switched off.
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module") and module.disable_adapters:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.original_module)
    before = list(model.modules())
    plain = model.unload()
    kept = set(plain.modules())
    for module in before:
        if module not in kept:  # in a circle of references they would keep the weights until a garbage collection
            module._modules.clear()
            module._parameters.clear()
    return plain


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def peft_type(peft_config: Any) -> str:
    return f"PEFT's {getattr(peft_config.peft_type, 'value', peft_config.peft_type)}"
