"""The model that stands for the trainer's: tiny, of random weights that are large enough to tell models apart."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from zoo.configurations import BOS, EOS, PAD, configuration, variant

MOST_PARAMETERS = 8_000_000
"""A model with more was not shrunk."""


def source_model(name: str) -> PreTrainedModel:
    """Builds an animal of the zoo in float32, in eval mode.

    Raises:
        LookupError: There is no model of this architecture here; the message says why.
        Exception: Whatever its classes raise.
    """
    config = configuration(name)
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    cls = classes[0] if isinstance(classes, tuple) else classes
    if cls.config_class not in (None, type(config)) and isinstance(config.get_text_config(), cls.config_class):
        config = config.get_text_config()
    torch.manual_seed(0)
    attention, adapter = variant(name).attention, variant(name).adapter
    model = cls._from_config(config, **({} if attention is None else {"attn_implementation": attention}))
    model = model.float().eval()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters > MOST_PARAMETERS:
        raise LookupError(f"{num_parameters} parameters: a field that the zoo does not shrink")
    if adapter is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **adapter)).float().eval()
        for parameter in model.parameters():
            parameter.requires_grad_(True)  # `randomise` leaves others alone
    randomise(model)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, bos_token_id=BOS)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Gives parameters and buffers values far from those of a constructor, so that one that is lost or rounded shows.

    The answers are to vary, for one token that is repeated shows little: matrices enlarge their inputs and have no
    answer to what all inputs share; every other number of a norm has its sign turned, without which a token is its own
    best follower where the embeddings are tied; biases are small. What a router adds to its scores lies at 8, where
    bfloat16 has steps of 1/16, and differs by less.
    """
    generator = torch.Generator().manual_seed(1)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or not parameter.is_floating_point():
            continue  # tables of sines, which are computed
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            scale = 0.5 if id(parameter) in embeddings else 1.5 / math.sqrt(parameter.shape[-1])
            parameter.copy_(centred(noise) * scale)
        elif name.endswith("weight"):  # a norm's, which some classes count from 1
            offset = 1 if parameter.abs().max() < 0.5 else 0
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.add_(offset).mul_(signs).sub_(offset).add_(noise * 0.2)
        else:
            parameter.add_(noise * 0.05)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                noise = torch.randn(buffer.shape, generator=generator)
                if "bias" in name:
                    buffer.copy_(8 + 0.05 * noise)
                else:
                    buffer.mul_(1 + 0.1 * noise)


def centred(matrix: Tensor) -> Tensor:
    """Takes off the means of rows and columns, whichever of them holds the inputs. Not those of a convolution."""
    for dim in (-1, -2):
        if matrix.shape[dim] >= 8:
            matrix = matrix - matrix.mean(dim, keepdim=True)
    return matrix
