"""`ModelHost`: what the rest of the package asks of a process that has the model.

Some of it is asked where generation is off, too (running on CPU, without flash-attn): `weights/` is imported only by
the members that use it, so that a run with generation off loads none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from verl_valgen.hosts.shared import SharedHost

if TYPE_CHECKING:
    from verl_valgen.weights.full_parameters import Consumer

_T = TypeVar("_T")


class ModelHost(SharedHost):
    """A rank's part of the model in training: engine, device, weights. In process with the loop, or in a worker."""

    model: nn.Module
    """The model in training: sharded, possibly with adapters."""
    compute_dtype: torch.dtype
    """The parameters' dtype in verl's mixed precision."""

    @property
    def model_class(self) -> type:
        """The transformers class that a plain copy of the model has."""
        from verl_valgen.weights.structure import base_model, original_class, unwrap

        return original_class(base_model(unwrap(self.model)))

    @property
    def model_config(self) -> PretrainedConfig:
        from verl_valgen.weights.structure import base_model, unwrap

        return base_model(unwrap(self.model)).config

    @property
    def generation_config(self) -> GenerationConfig | None:
        from verl_valgen.weights.structure import base_model, unwrap

        return base_model(unwrap(self.model)).generation_config

    def why_not_generating(self) -> str | None:
        model_class: Any = self.model_class
        if hasattr(model_class, "generate") and model_class.can_generate():
            return None
        return f"the model class {model_class.__name__} has no `generate`"

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, the same number on all ranks."""
        from verl_valgen.weights.sizes import num_parameters

        return num_parameters(self.model)

    @property
    def has_experts(self) -> bool:
        """Whether the model is a mixture of experts."""
        return has_experts(self.model)

    @property
    def largest_unit_bytes(self) -> int:
        """Bytes that gathering takes beside the copy: see `verl_valgen.weights.sizes.largest_unit_bytes`."""
        from verl_valgen.weights.sizes import largest_unit_bytes

        return largest_unit_bytes(self.model)

    def on_device(self) -> AbstractContextManager[None]:
        """While open, parameters that verl keeps in host memory between steps are on the device."""
        return nullcontext()

    def gather(self, dtype: torch.dtype, *, keep: bool) -> PreTrainedModel | None:
        """Copies the weights into a plain transformers model. Collective: all ranks must call.

        See `verl_valgen.weights.gather.gather`.

        Returns:
            The copy on `device` where `keep` is true, None on other ranks.
        """
        from verl_valgen.weights.gather import gather

        return gather(self.model, dtype=dtype, device=self.device, keep=keep)

    def stream(self, consume: Consumer[_T], dtype: torch.dtype, *, keep: bool) -> _T | None:
        """Has `consume` pull the weights as a checkpoint has them, tensor by tensor. Collective: all ranks must call.

        See `verl_valgen.weights.checkpoint_stream.stream`, for names, dtypes, and what is raised where.

        Args:
            consume: Called where `keep` is true, with an iterator of pairs of a name and a whole tensor on `device`,
                which is valid until the next one is asked for. It may stop early, or raise.

        Returns:
            What `consume` returns where `keep` is true, None on other ranks.
        """
        from verl_valgen.weights.checkpoint_stream import stream

        return stream(self.model, consume, dtype=dtype, device=self.device, keep=keep)

    def why_not_sharded(self) -> str | None:
        """The reason why `generate` cannot run through the sharded model, None if it can."""
        return None

    def read(self, texts: Sequence[Sequence[int]], nums_last: Sequence[int]) -> list[Tensor]:
        """The model's own logits for texts, computed as verl validates, in one pass. Collective: all ranks must call.

        See `verl_valgen.weights.sharded.read`. Only where `why_not_sharded` gives no reason.
        """
        from verl_valgen.weights.sharded import read

        return read(self.model, texts, nums_last, self.compute_dtype, self.device)

    def mean_logprob(self, input_ids: Sequence[int], output_ids: Sequence[int]) -> float | None:
        """The mean of ln p(token | preceding tokens) over an answer's tokens, as verl's own forward pass has it.

        Collective: all ranks must call, with the same tokens. Works where `read` does not.

        Args:
            input_ids: Prompt and answer, without the answer's last token.
            output_ids: The answer.

        Returns:
            None on ranks that verl gives no output, and where verl has no such forward pass.
        """
        return None


def has_experts(model: nn.Module) -> bool:
    """Whether modules of a model, or their classes, are called experts."""
    # Not classes called "Moe": those of a mixture of experts have dense variants.
    return any(
        "moe" in name.lower() or "expert" in f"{name} {type(module).__name__}".lower()
        for name, module in model.named_modules()
    )


def current_device(device_type: str) -> torch.device:
    """The device of type "cpu", "cuda" or "npu" that this rank computes on."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, getattr(torch, device_type).current_device())
