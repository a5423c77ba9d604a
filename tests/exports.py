"""What an engine exports of a transformers model: every expert by itself, under the names that checkpoints have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def by_expert(
    parameters: Iterable[tuple[str, Tensor]],
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    mlp: str = "mlp",
) -> Iterator[tuple[str, Tensor]]:
    """Splits packed experts as a checkpoint has them, whatever transformers' own conversion says.

    Args:
        parameters: Of transformers 4 or 5, one after the other.
        projections: What the checkpoint calls an expert's three matrices.
        mlp: What it calls the module that holds router and experts.
    """
    gate, up, down = projections
    for name, tensor in parameters:
        packed = next((suffix for suffix in (_GATE_UP, _DOWN) if name.endswith(suffix)), None)
        base = re.sub(r"\.mlp\.", f".{mlp}.", name)
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
