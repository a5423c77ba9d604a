"""`EngineHost`: the model of one of verl's engines, verl 0.6 to 0.9; in the trainer itself, or in a worker of Ray.

FSDP's engine holds a model that can be seen. Other engines are asked for their configuration and for their weights
under Hugging Face's names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from verl_valgen.hosts import fused_kernels
from verl_valgen.hosts.model_host import ModelHost, current_device, has_experts

if TYPE_CHECKING:
    from verl_valgen.weights.full_parameters import Consumer, Parameters

_T = TypeVar("_T")

_FSDP = ("fsdp", "fsdp2")
"""Values of `engine.strategy`."""


class EngineHost(ModelHost):
    """A rank's engine.

    Args:
        engine: One of verl's `BaseEngine`, which has its model.
        model_config: verl's configuration of the model.
        engine_config: verl's configuration of the engine.
        device_type: "cpu", "cuda" or "npu".
    """

    def __init__(self, engine: Any, model_config: Any, engine_config: Any, device_type: str) -> None:
        self.engine = engine
        self.model = engine.module  # anything at all, in other engines than FSDP's
        self.verl_model_config = model_config
        self.tokenizer = model_config.tokenizer
        self.is_logging_rank = is_logging_rank_of(engine)
        self.device = current_device(device_type)
        self.compute_dtype = _compute_dtype(engine_config)
        self.is_sharded_by_fsdp = engine_config.strategy in _FSDP and isinstance(self.model, FSDP | FSDPModule)
        """Whether the engine is FSDP's, so that the model is a transformers model under FSDP1 or FSDP2. (Others, VeOmni
        and automodel, use FSDP2 for models of their own, with experts that are split in another way.)"""

    @property
    def model_class(self) -> type:
        return super().model_class if self.is_sharded_by_fsdp else type(self._empty_model())

    @property
    def model_config(self) -> PretrainedConfig:
        return super().model_config if self.is_sharded_by_fsdp else self.verl_model_config.hf_config

    @property
    def generation_config(self) -> GenerationConfig | None:
        return super().generation_config if self.is_sharded_by_fsdp else self.verl_model_config.generation_config

    @cached_property
    def num_parameters(self) -> int:
        if self.is_sharded_by_fsdp:
            return super().num_parameters
        return sum(parameter.numel() for parameter in self._empty_model().parameters())

    @cached_property
    def has_experts(self) -> bool:
        return super().has_experts if self.is_sharded_by_fsdp else has_experts(self._empty_model())

    @property
    def largest_unit_bytes(self) -> int:
        return super().largest_unit_bytes if self.is_sharded_by_fsdp else 0  # other engines do not say

    def gather(self, dtype: torch.dtype, *, keep: bool) -> PreTrainedModel | None:
        from verl_valgen.weights.exported import ExportedCopy
        from verl_valgen.weights.gather import collect

        if self.is_sharded_by_fsdp:
            model = super().gather(dtype, keep=keep)
        else:
            model = collect(
                lambda _: self._exported_parameters(),
                lambda: ExportedCopy(self._empty_model(dtype), self.device, exporter=type(self.engine).__name__),
                dtype=dtype,
                device=self.device,
                keep=keep,
            )
        if model is not None:
            model.__class__ = fused_kernels.with_original_forward(type(model))
        return model

    def stream(self, consume: Consumer[_T], dtype: torch.dtype, *, keep: bool) -> _T | None:
        from verl_valgen.weights.checkpoint_stream import stream_exported

        if self.is_sharded_by_fsdp:
            return super().stream(consume, dtype, keep=keep)
        return stream_exported(
            self._exported_parameters,
            lambda: self._empty_model(dtype),
            consume,
            device=self.device,
            keep=keep,
        )

    def why_not_sharded(self) -> str | None:
        if not self.is_sharded_by_fsdp:
            return f"the model of {type(self.engine).__name__} is no transformers model"
        if self.engine.ulysses_sequence_parallel_size > 1:
            return "with engine.ulysses_sequence_parallel_size > 1 a forward pass takes a part of each sequence"
        if fused_kernels.may_be_replaced(self.model_class) and self.verl_model_config.use_fused_kernels:
            return "with model.use_fused_kernels a forward pass gives no logits"
        return None

    def mean_logprob(self, input_ids: Sequence[int], output_ids: Sequence[int]) -> float | None:
        from verl.utils import tensordict_utils as tu

        ids = torch.tensor([*input_ids, output_ids[-1]])
        tensors = {"input_ids": ids, "position_ids": torch.arange(len(ids)), "loss_mask": torch.ones_like(ids)}
        data = tu.get_tensordict(
            {name: torch.nested.as_nested_tensor([value], layout=torch.jagged) for name, value in tensors.items()},
            non_tensor_dict={
                "use_remove_padding": self.verl_model_config.use_remove_padding,
                "use_dynamic_bsz": False,
                "use_fused_kernels": self.verl_model_config.use_fused_kernels,
                "micro_batch_size_per_gpu": 1,
                "temperature": 1.0,
                "global_batch_size": self.engine.get_data_parallel_size(),
                "pad_mode": "no_padding",
                "pad_token_id": self.tokenizer.pad_token_id,
            },
        )
        with self.engine.eval_mode():
            output = self.engine.infer_batch(data, loss_function=None)
        if not self.engine.is_mp_src_rank_with_outputs():
            return None
        logprobs = output["model_output"]["log_probs"].values()  # (L,); each stands at the position before its token
        return logprobs[-len(output_ids) - 1 : -1].float().mean().item()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        if not hasattr(self.engine, "is_param_offload_enabled"):  # verl 0.6, whose `to` moves no offloaded parameters
            with self.engine.eval_mode():
                yield
            return
        if not self.engine.is_param_offload_enabled:
            yield
            return
        try:
            self.engine.to(self.device.type, model=True, optimizer=False, grad=False)
            yield
        finally:
            self.engine.to("cpu", model=True, optimizer=False, grad=False)

    def _empty_model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        from verl.utils.model import get_hf_auto_model_class

        from verl_valgen.weights.empty import empty_from_config

        config = self.verl_model_config.hf_config
        trust = {"trust_remote_code": True} if self.verl_model_config.trust_remote_code else {}
        return empty_from_config(get_hf_auto_model_class(config), config, dtype, **trust)

    def _exported_parameters(self) -> Parameters:
        """The engine's parameters under Hugging Face's names. Collective: all ranks must call, and exhaust the result.

        Raises:
            ValueError: On all ranks, if the engine exports adapters apart from the weights.
        """
        parameters, peft_config = self.engine.get_per_tensor_param()
        if peft_config is not None:
            if hasattr(parameters, "close"):
                parameters.close()
            raise ValueError(
                f"{type(self.engine).__name__} exports weights without their adapters: set model.lora.merge=true"
            )

        def stream() -> Parameters:  # closed, it closes the engine's
            yield from parameters

        return stream()


def is_logging_rank_of(engine: Any) -> bool:
    """Whether this is the one rank that has the outputs of the first data-parallel rank."""
    return engine.is_mp_src_rank_with_outputs() and engine.get_data_parallel_rank() == 0


def _compute_dtype(engine_config: Any) -> torch.dtype:
    from verl.utils.torch_dtypes import PrecisionType

    mixed_precision = getattr(engine_config, "mixed_precision", None)
    if isinstance(mixed_precision, Mapping):  # a mapping in FSDP's configuration alone, in others true or false
        return PrecisionType.to_dtype(mixed_precision.get("param_dtype", "bf16"))
    return PrecisionType.to_dtype(getattr(engine_config, "mp_param_dtype", "bf16"))  # automodel's key
