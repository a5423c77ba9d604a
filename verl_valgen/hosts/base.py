"""What the rest of the package needs to know of a trainer.

A host's class is also asked what a run needs where generation is off: what gathers is imported where it is used.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from types import ModuleType
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import Dataset
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from verl_valgen.hosts.loaders import hooked
from verl_valgen.hosts.schedule import Schedule

logger = logging.getLogger(__name__)


class Host(ABC):
    """A built trainer, seen through one set of names."""

    trainer_name: ClassVar[str]
    """Name of the trainer class in verl's module."""

    config: DictConfig
    model: nn.Module
    """The model as it is trained: sharded, possibly with adapters."""
    tokenizer: PreTrainedTokenizerBase
    val_dataset: Dataset
    device: torch.device
    """The device that this rank computes on."""
    compute_dtype: torch.dtype
    """The dtype of verl's mixed precision."""
    is_logging_rank: bool
    """Whether this is the rank that owns verl's trackers."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @property
    def loggers(self) -> list[str]:
        """verl's names of the trackers that the run asks for."""
        loggers = self.config.trainer.logger
        return [loggers] if isinstance(loggers, str) else list(loggers)

    @property
    def model_class(self) -> type:
        """The class that a plain copy of the model has."""
        from verl_valgen.weights.plain_copy import base_model, original_class, unwrap

        return original_class(base_model(unwrap(self.model)))

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The model's own."""
        from verl_valgen.weights.plain_copy import base_model, unwrap

        return base_model(unwrap(self.model)).generation_config

    @property
    def num_parameters(self) -> int:
        """Of the whole model; the same on all ranks."""
        from verl_valgen.weights.gather import num_parameters

        return num_parameters(self.model)

    @property
    def largest_unit_bytes(self) -> int:
        """See `verl_valgen.weights.gather.largest_unit_bytes`."""
        from verl_valgen.weights.gather import largest_unit_bytes

        return largest_unit_bytes(self.model)

    @property
    def model_config(self) -> PretrainedConfig:
        """transformers' configuration of the model."""
        from verl_valgen.weights.plain_copy import base_model, unwrap

        return base_model(unwrap(self.model)).config

    def on_device(self) -> AbstractContextManager[None]:
        """Parameters that verl keeps in host memory between steps are on the device while it is open."""
        return nullcontext()

    def gather(self, dtype: torch.dtype, *, keep: bool) -> PreTrainedModel | None:
        """A plain copy of the model where it is kept, None elsewhere. Collective: all ranks must call.

        See `verl_valgen.weights.gather.gather`.
        """
        from verl_valgen.weights.gather import gather

        return gather(self.model, dtype=dtype, device=self.device, keep=keep)

    def why_not_sharded(self) -> str | None:
        """Why `generate` cannot run through the sharded model, None where it can."""
        return None

    @abstractmethod
    def schedule(self) -> Schedule: ...

    def validation_rows(self, limit: int) -> list[int]:
        """Rows of the data set that this rank's first validation batches hold, in their order, at most `limit`."""
        loader = self.trainer.val_dataloader
        num_rows = min(limit, len(loader) * loader.batch_size)
        return list(islice(iter(self.trainer.val_sampler), num_rows))

    @abstractmethod
    def why_no_validation_batch(self) -> str | None:
        """The reason for which a validation would see no batch, None where it sees one."""

    def hooked(self, hook: Callable[[int], None], *, before_train: bool) -> AbstractContextManager[None]:
        """While it is open, `fit()` calls `hook(step)` at the end of every validation, on all ranks in step.

        Args:
            before_train: And before the first training batch.
        """
        return hooked(self.trainer, hook, before_train=before_train)

    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]:
        """What verl's data sets pass to the chat template of every row."""
        return OmegaConf.select(self.config, "data.apply_chat_template_kwargs") or {}

    @classmethod
    def while_building(cls) -> AbstractContextManager[None]:
        """Open while verl's trainer is constructed."""
        return nullcontext()

    @classmethod
    @abstractmethod
    def has_accelerator(cls, module: ModuleType) -> bool:
        """Whether there is CUDA or NPU, as verl's trainer in `module` sees it."""

    @classmethod
    @abstractmethod
    def launch_support(cls, module: ModuleType, config: DictConfig) -> AbstractContextManager[None]:
        """What verl's trainer in `module` needs to run here, where it would fail otherwise. Says what it does."""


def current_device(device_type: str) -> torch.device:
    """The device of a type that this rank computes on."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, getattr(torch, device_type).current_device())


def flash_attn_works() -> bool:
    """Says so where it does not: the model is then loaded with transformers' own attention."""
    # An installed build may have been made for another torch: only the import tells.
    try:
        importlib.import_module("flash_attn")
    except Exception:
        logger.info("flash-attn cannot be imported: the model is loaded with transformers' default attention (sdpa)")
        return False
    return True
