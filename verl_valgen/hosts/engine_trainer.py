"""`EngineTrainerHost`: the training loop of verl's trainers that run engines, `sft_trainer` and `sft_trainer_ray`."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_valgen.hosts import forecast
from verl_valgen.hosts.schedule import Schedule
from verl_valgen.hosts.trainer_host import TrainerHost
from verl_valgen.text import printable


class EngineTrainerHost(TrainerHost):
    """What both trainers have in common: configuration, schedule, validation data."""

    trainer_name = "SFTTrainer"

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.config = trainer.config
        self.verl_model_config = trainer.model_config
        self.tokenizer = self.verl_model_config.tokenizer
        self.val_dataset = trainer.val_dataset

    def schedule(self) -> Schedule:
        trainer = self.trainer
        return self._schedule(self.config.trainer.total_epochs, trainer.total_training_steps, trainer.test_freq)

    def why_no_validation_batch(self) -> str | None:
        trainer = self.trainer
        if trainer.val_dataloader is not None and len(trainer.val_dataloader) > 0:
            return None
        if not trainer.val_dataset:
            problem = "has no rows" if self.config.data.val_files else "is not set"
            fails = f", so verl will fail where it validates (trainer.test_freq={trainer.test_freq})"
            return f"data.val_files {problem}{fails if trainer.test_freq > 0 else ''}"
        return (
            f"data.val_files has {len(trainer.val_dataset)} rows, fewer than one global batch "
            f"(data.train_batch_size={trainer.global_batch_size}{self._share_of_ranks()}), and verl drops incomplete "
            "batches: its val/loss will be nan"
        )

    def _share_of_ranks(self) -> str:
        """What each rank's loader has of a global batch, in words; "" where one loader has all of it."""
        return ""

    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]:
        thinking = OmegaConf.select(self.config, "data.enable_thinking_default")
        return {**super().chat_template_kwargs, **({} if thinking is None else {"enable_thinking": bool(thinking)})}

    @classmethod
    def _foretell_crash(cls, config: DictConfig, num_ranks: int) -> str | None:
        if config.engine.strategy not in ("fsdp", "fsdp2"):  # other engines split the ranks in ways of their own
            return None
        if not config.data.val_files:
            problem = "must be set"
        elif forecast.num_rows(config, "val") == 0:
            problem = f"must have rows, got {printable(str(config.data.val_files), 200)}, which has none"
        else:
            return None
        num_loaders = cls._num_loaders(num_ranks // config.engine.ulysses_sequence_parallel_size)
        schedule = forecast.new_schedule(config, num_loaders)
        # Where only the last step would validate, verl sees that there is nothing to validate.
        if schedule is None or schedule.test_freq <= 0:
            return None
        steps = [step for step in schedule.validation_steps() if step % schedule.test_freq == 0]
        if not steps:
            return None
        return (
            f"data.val_files {problem}: trainer.test_freq={config.trainer.test_freq} makes verl validate at step "
            f"{steps[0]}, where it would crash"
        )

    @classmethod
    def _num_loaders(cls, num_data_ranks: int) -> int:
        """How many loaders share the rows."""
        return num_data_ranks

    @classmethod
    def has_accelerator(cls, module: ModuleType) -> bool:
        from verl.utils.device import is_cuda_available, is_npu_available

        return is_cuda_available or is_npu_available
