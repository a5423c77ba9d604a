"""`Host`: what the rest of the package asks of verl's trainers. (Over 200 lines: it is one interface.)

Some of it is asked where generation is off, too (running on CPU, without flash-attn): `weights/` is imported only by
the members that use it, so that a run with generation off loads none of it.
"""

from __future__ import annotations

import copy
import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import islice
from types import ModuleType
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from verl_valgen.collectives import attempt
from verl_valgen.hosts import forecast
from verl_valgen.hosts.loaders import hooked, num_batches_left
from verl_valgen.hosts.loggers import loggers_remembered
from verl_valgen.hosts.schedule import Schedule
from verl_valgen.text import describe

logger = logging.getLogger(__name__)


class Host(ABC):
    """A trainer of verl's that has been built, seen through names that do not depend on verl's version.

    The members come in three groups: the model, the training run, and, as class methods, the program before there is a
    trainer.
    """

    # The model: engine, device, weights. A worker process could answer for these.

    model: nn.Module
    """The model in training: sharded, possibly with adapters."""
    device: torch.device
    """The device that this rank computes on."""
    compute_dtype: torch.dtype
    """The parameters' dtype in verl's mixed precision."""

    @property
    def model_class(self) -> type:
        """The transformers class that a plain copy of the model has."""
        from verl_valgen.weights.structure import base_model, original_class, unwrap

        return original_class(base_model(unwrap(self.model)))

    @property
    def model_config(self) -> PretrainedConfig:
        """transformers' configuration of the model."""
        from verl_valgen.weights.structure import base_model, unwrap

        return base_model(unwrap(self.model)).config

    @property
    def generation_config(self) -> GenerationConfig | None:
        """transformers' generation configuration that came with the model."""
        from verl_valgen.weights.structure import base_model, unwrap

        return base_model(unwrap(self.model)).generation_config

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

    # The training run: data, schedule, trackers. The process that holds the loop answers for these.

    config: DictConfig
    """verl's configuration."""
    tokenizer: PreTrainedTokenizerBase
    val_dataset: Dataset
    is_logging_rank: bool
    """Whether this rank owns verl's trackers."""
    verl_loggers: dict[str, Any]
    """verl's own logger objects by the names of `trainer.logger`, once `fit()` has made them; empty on other ranks."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.verl_loggers = {}

    @cached_property
    def own_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer for another thread than the trainer's, whose data set may use its own at the same time: while
        one is in use it refuses some calls ("Already borrowed"), and training would end. It is the trainer's where it
        cannot be copied: then there may be no such thread."""
        own, error = attempt(lambda: copy.deepcopy(self.tokenizer))
        return self.tokenizer if error is not None else own

    @abstractmethod
    def schedule(self) -> Schedule:
        """The numbers by which `fit()` decides when to validate."""

    def _schedule(self, num_epochs: int, total_training_steps: int | None, test_freq: int) -> Schedule:
        """The schedule of a loop over `train_dataloader` of so many epochs, as verl begins it where a run resumes."""
        loader, start_step = self.trainer.train_dataloader, self.trainer.resume_global_step
        steps_per_epoch = len(loader)
        epochs_left = max(0, num_epochs - start_step // max(1, steps_per_epoch))
        num_left = num_batches_left(loader)
        steps_left = num_left + (epochs_left - 1) * steps_per_epoch if epochs_left else 0
        return Schedule(
            start_step=start_step,
            available_steps=start_step + steps_left,
            total_training_steps=num_epochs * steps_per_epoch if total_training_steps is None else total_training_steps,
            test_freq=test_freq,
            lost_steps=steps_per_epoch if epochs_left and num_left == 0 else 0,
        )

    def validation_rows(self, limit: int) -> list[int]:
        """Rows of the data set in this rank's first validation batches, in their order, at most `limit`."""
        loader = self.trainer.val_dataloader
        num_rows = min(limit, len(loader) * loader.batch_size)
        return list(islice(iter(self.trainer.val_sampler), num_rows))

    @abstractmethod
    def why_no_validation_batch(self) -> str | None:
        """The reason why validation will see no batch, None if it will see one."""

    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]:
        """Keyword arguments that verl's data sets pass to the chat template for every row."""
        return OmegaConf.select(self.config, "data.apply_chat_template_kwargs") or {}

    @contextmanager
    def hooked(
        self, hook: Callable[[int], None], *, before_train: bool, at_batch: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """While open, `fit()` calls `hook(step)` at the end of every validation, on all ranks in step.

        Args:
            before_train: Whether `fit()` also calls it before the first training batch.
            at_batch: Called before each training batch, on the thread of `fit()`.
        """
        self.verl_loggers.clear()  # the same object: whoever records the rounds has it already
        hooks = hooked(self.trainer, hook, before_train=before_train, at_batch=at_batch)
        with loggers_remembered(self.verl_loggers), hooks:
            yield

    # The program: what a trainer needs before it exists.

    trainer_name: ClassVar[str]
    """Name of the trainer class in verl's module."""

    @classmethod
    def why_validation_will_crash(cls, config: DictConfig, num_ranks: int) -> str | None:
        """Foretells from the configuration that verl is certain to crash where it first validates.

        Opens data files for their number of rows, and loads nothing.

        Args:
            num_ranks: Processes of the run.

        Returns:
            The key, its value and what is wrong with it, None unless the crash is certain.
        """
        try:
            return cls._foretell_crash(config, num_ranks)
        except Exception as e:  # a configuration or a file that verl will refuse in its own words
            logger.debug("whether validation can work is not known: %s", describe(e))
            return None

    @classmethod
    def _foretell_crash(cls, config: DictConfig, num_ranks: int) -> str | None:
        """`why_validation_will_crash` of this trainer; may raise where the configuration is wrong."""
        return None

    @classmethod
    def num_validation_rows(cls, config: DictConfig) -> int | None:
        """The validation rows from which some can be chosen, None where that is not certain before they are read."""
        try:
            is_shuffled = OmegaConf.select(config, "data.shuffle", default=False)  # before data.val_max_samples cuts
            return (forecast.num_rows_in_files if is_shuffled else forecast.num_rows)(config, "val")
        except Exception as e:  # a configuration or a file that verl will refuse in its own words
            logger.debug("how many validation rows there are is not known: %s", describe(e))
            return None

    @classmethod
    @abstractmethod
    def has_accelerator(cls, module: ModuleType) -> bool:
        """Whether there is CUDA or NPU, as verl's trainer in `module` sees it."""

    @classmethod
    @abstractmethod
    def launch_support(cls, module: ModuleType, config: DictConfig) -> AbstractContextManager[None]:
        """While open, verl's trainer in `module` runs on this machine even where it would fail by itself.

        Logs what it changes.
        """

    @classmethod
    def while_building(cls) -> AbstractContextManager[None]:
        """Must be open while verl's trainer is constructed."""
        return nullcontext()


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


def flash_attn_works() -> bool:
    """Whether flash-attn can be imported; logs that the model gets transformers' own attention if not."""
    # An installed build may have been made for another torch: only the import tells.
    try:
        importlib.import_module("flash_attn")
    except Exception:
        logger.info("flash-attn cannot be imported: the model is loaded with transformers' default attention (sdpa)")
        return False
    return True
