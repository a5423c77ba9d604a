"""The host for `verl.trainer.sft_trainer.SFTTrainer`, verl 0.6 to 0.9: the trainer that runs engines, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_valgen.hosts import cpu, fused_kernels
from verl_valgen.hosts.base import Host
from verl_valgen.hosts.engine import EngineHost
from verl_valgen.hosts.engine_trainer import EngineTrainerHost
from verl_valgen.hosts.trainer_host import flash_attn_works


class SFTHost(EngineHost, EngineTrainerHost, Host):
    """verl's trainer that runs engines."""

    def __init__(self, trainer: Any) -> None:
        EngineTrainerHost.__init__(self, trainer)
        EngineHost.__init__(self, trainer.engine, trainer.model_config, trainer.engine_config, trainer.device_name)

    def _share_of_ranks(self) -> str:
        return (
            f", {self.trainer.train_batch_size_per_dp} rows on each of {self.engine.get_data_parallel_size()} "
            "data-parallel ranks"
        )

    @classmethod
    @contextmanager
    def launch_support(cls, module: ModuleType, config: DictConfig) -> Iterator[None]:
        with ExitStack() as stack:
            if not cls.has_accelerator(module):
                stack.enter_context(cpu.sft_support(module, config))
            if "attn_implementation" not in config.model.override_config and not flash_attn_works():
                OmegaConf.update(config, "model.override_config.attn_implementation", "sdpa", force_add=True)
            yield

    @classmethod
    def while_building(cls, module: ModuleType) -> AbstractContextManager[None]:
        return fused_kernels.forwards_remembered()
