"""An engine of another kind for `verl.trainer.sft_trainer`, which imports it through `model.external_lib`.

It trains as verl's FSDP engine does, but seen from outside it is like Megatron's: `module` is a list, and the weights
are to be had from `get_per_tensor_param` alone, every expert by itself, which all ranks must exhaust.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from exports import as_checkpoints_have
from torch import Tensor, nn
from verl.utils.fsdp_utils import apply_fsdp2
from verl.workers.config import FSDPEngineConfig
from verl.workers.config.engine import EngineConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead


@dataclass
class ListEngineConfig(FSDPEngineConfig):
    strategy: str = "list"

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)  # the FSDP engine's own knows its own strategies only


@EngineRegistry.register(model_type="language_model", backend="list", device="cpu")
class ListEngine(FSDPEngineWithLMHead):
    def initialize(self) -> None:
        super().initialize()
        self.module = [self.module]

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        # Said of the root too: otherwise it stays whole after a validation, and verl cannot undo a merge of adapters.
        apply_fsdp2(module, {"mesh": self.device_mesh, "reshard_after_forward": True}, self.engine_config)
        return module

    @contextmanager
    def _out_of_the_list(self) -> Iterator[None]:
        """What is inherited finds the model where it expects it."""
        modules = self.module
        (self.module,) = modules
        try:
            yield
        finally:
            self.module = modules

    @contextmanager
    def train_mode(self, **kwargs: Any) -> Iterator[None]:
        with self._out_of_the_list(), super().train_mode(**kwargs):
            yield

    @contextmanager
    def eval_mode(self, **kwargs: Any) -> Iterator[None]:
        with self._out_of_the_list(), super().eval_mode(**kwargs):
            yield

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._out_of_the_list():
            super().save_checkpoint(*args, **kwargs)

    def get_per_tensor_param(self, **kwargs: Any) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any] | None]:
        with self._out_of_the_list():
            parameters, peft_config = super().get_per_tensor_param(**kwargs)
        return self._export(parameters), peft_config

    def _export(self, parameters: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        tied = self.model_config.share_embeddings_and_output_weights
        with self._out_of_the_list():
            # A DTensor's `full_tensor`, one after the other.
            for name, parameter in as_checkpoints_have(self.model_config.hf_config.model_type, parameters):
                if not (tied and name == "lm_head.weight"):  # the embeddings are there under one name
                    yield name, parameter
