"""What an engine exports of a transformers model: every expert by itself, under the names that checkpoints have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"
_ALREADY_SPLIT = re.compile(r"\.mlp(\.experts\.\d+\.)(gate|up|down)_proj\.weight$")
_OWN_NAMES = {"mixtral": (("w1", "w3", "w2"), "block_sparse_moe")}
"""Architecture -> the names of its experts in checkpoints, where they are not the usual ones."""
_PACKED = ("gpt_oss",)
"""Architectures whose experts are packed in checkpoints, too."""


def as_checkpoints_have(model_type: str, parameters: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Parameters of transformers 4 or 5 under the names that checkpoints of an architecture have."""
    return parameters if model_type in _PACKED else by_expert(parameters, *_OWN_NAMES.get(model_type, ()))


def by_expert(
    parameters: Iterable[tuple[str, Tensor]],
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    mlp: str = "mlp",
) -> Iterator[tuple[str, Tensor]]:
    """Splits packed experts as a checkpoint has them, whatever transformers' own conversion says.

    What verl 0.9 has split already is renamed alone.

    Args:
        parameters: Of transformers 4 or 5, one after the other.
        projections: What the checkpoint calls an expert's three matrices.
        mlp: What it calls the module that holds router and experts.
    """
    gate, up, down = projections
    for name, tensor in parameters:
        packed = next((suffix for suffix in (_GATE_UP, _DOWN) if name.endswith(suffix)), None)
        base = re.sub(r"\.mlp\.", f".{mlp}.", name)
        if split := _ALREADY_SPLIT.search(name):
            projection = {"gate": gate, "up": up, "down": down}[split[2]]
            yield f"{name[: split.start()]}.{mlp}{split[1]}{projection}.weight", tensor
            continue
        if packed is None:
            yield (base if ".mlp.gate." in name else name), tensor
            continue
        for i, expert in enumerate(tensor):
            prefix = f"{base.removesuffix(packed)}.experts.{i}"
            if packed == _DOWN:
                yield f"{prefix}.{down}.weight", expert
            else:
                for projection, half in zip((gate, up), expert.chunk(2), strict=True):
                    yield f"{prefix}.{projection}.weight", half


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Gives every tensor numbers of its own: what stands at zero looks right in another's place, too."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
