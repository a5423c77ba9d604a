"""The host for `verl.trainer.fsdp_sft_trainer.FSDPSFTTrainer`, verl 0.5 to 0.7.0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig
from packaging.version import Version

from verl_valgen.hosts import cpu, forecast
from verl_valgen.hosts.base import Host, current_device, flash_attn_works
from verl_valgen.hosts.schedule import Schedule
from verl_valgen.patching import patched


class FSDPSFTHost(Host):
    """verl's older trainer, which shards the model itself."""

    trainer_name = "FSDPSFTTrainer"

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.config = trainer.config
        self.model = trainer.fsdp_model
        self.tokenizer = trainer.tokenizer
        self.val_dataset = trainer.val_dataset
        self.is_logging_rank = trainer.device_mesh.get_rank() == 0
        self.device = current_device(trainer.device_mesh.device_type)
        self.compute_dtype = torch.bfloat16  # hard-coded in verl's trainer

    def why_not_sharded(self) -> str | None:
        if self.config.ulysses_sequence_parallel_size > 1:
            return "with ulysses_sequence_parallel_size > 1 a forward pass takes a part of each sequence"
        return None

    def mean_logprob(self, input_ids: Sequence[int], output_ids: Sequence[int]) -> float | None:
        from verl_valgen.weights.sharded import evaluating

        ids = torch.tensor([[*input_ids, output_ids[-1]]])  # (1, L)
        positions = torch.arange(ids.shape[1])[None]
        shift = 1 if Version(metadata.version("verl")) < Version("0.6") else 0  # its masks stand one to the left
        end = ids.shape[1] - shift
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": positions,
            "loss_mask": ((positions >= end - len(output_ids)) & (positions < end)).long(),
        }
        with evaluating(self.model):
            loss = self.trainer.validation_step(batch).item()  # the mean over ranks that have all read the same
        # Where tokens are balanced, verl counts them over all ranks, and scales by the data-parallel ones alone.
        return -loss * (self.config.ulysses_sequence_parallel_size if self.config.data.balance_dp_token else 1)

    def schedule(self) -> Schedule:
        config = self.config.trainer
        return self._schedule(config.total_epochs, config.total_training_steps, config.test_freq)

    def why_no_validation_batch(self) -> str | None:
        loader = self.trainer.val_dataloader
        if len(loader) > 0:
            return None
        num_rows, num_ranks = len(self.trainer.val_dataset), self.trainer.val_sampler.num_replicas
        return (
            f"data.val_files has {num_rows} rows, fewer than one batch on each of {num_ranks} data-parallel ranks "
            f"({loader.batch_size} rows each, data.micro_batch_size_per_gpu), and verl drops incomplete batches"
        )

    @classmethod
    def _foretell_crash(cls, config: DictConfig, num_ranks: int) -> str | None:
        num_ranks //= config.ulysses_sequence_parallel_size
        batch_size = config.data.micro_batch_size_per_gpu
        rows = forecast.num_rows(config, "val")
        if rows is None or forecast.num_batches(rows, num_ranks, batch_size) > 0:
            return None
        schedule = forecast.new_schedule(config, num_ranks)
        if schedule is None or not (steps := schedule.validation_steps()):
            return None
        return (
            f"data.val_files must have at least {batch_size * num_ranks} rows, a batch on each of {num_ranks} "
            f"data-parallel ranks (data.micro_batch_size_per_gpu={batch_size}), got {rows}: verl drops incomplete "
            f"batches and would crash at its first validation, at step {steps[0]}"
        )

    @classmethod
    def has_accelerator(cls, module: ModuleType) -> bool:
        return module.is_cuda_available or module.is_npu_available

    @classmethod
    @contextmanager
    def launch_support(cls, module: ModuleType, config: DictConfig) -> Iterator[None]:
        with ExitStack() as stack:
            if not cls.has_accelerator(module):
                stack.enter_context(cpu.fsdp_sft_support(module, config))
            if not flash_attn_works():
                stack.enter_context(
                    patched(module, "AutoModelForCausalLM", _DefaultAttention(module.AutoModelForCausalLM))
                )
            yield


class _DefaultAttention:
    """Stands in for `AutoModelForCausalLM`, without the hard-coded `attn_implementation="flash_attention_2"`."""

    def __init__(self, auto_class: Any) -> None:
        self.auto_class = auto_class

    def from_pretrained(self, *args: Any, attn_implementation: str | None = None, **kwargs: Any) -> Any:
        return self.auto_class.from_pretrained(*args, **kwargs)
