"""`TrainerHost`: what the rest of the package asks of the process that holds verl's training loop.

The members come in two groups: the training run, and, as class methods, the program before there is a trainer.
"""

from __future__ import annotations

import importlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from types import ModuleType
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from verl_valgen.hosts import forecast
from verl_valgen.hosts.loaders import hooked, num_batches_left
from verl_valgen.hosts.loggers import loggers_remembered
from verl_valgen.hosts.schedule import Schedule
from verl_valgen.hosts.shared import SharedHost
from verl_valgen.text import describe

logger = logging.getLogger(__name__)


class TrainerHost(SharedHost):
    """A trainer of verl's that has been built, seen through names that do not depend on verl's version: data, schedule,
    trackers."""

    config: DictConfig
    """verl's configuration."""
    val_dataset: Dataset
    fatal_errors: tuple[type[BaseException], ...] = ()
    """What no training can go on after: rounds let it pass."""
    verl_loggers: dict[str, Any]
    """verl's own logger objects by the names of `trainer.logger`, once `fit()` has made them; empty on other ranks."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.verl_loggers = {}

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
    is_spmd: ClassVar[bool] = True
    """Whether every rank runs the program; else one process does, without torchrun's variables."""
    answerer: ClassVar[str] = "verl_valgen.rounds.local:LocalAnswerer"
    """"module:class" of the `RoundAnswerer` for this trainer."""

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
    def while_building(cls, module: ModuleType) -> AbstractContextManager[None]:
        """Must be open while verl's trainer, whose class is in `module`, is constructed."""
        return nullcontext()


def can_import_flash_attn() -> bool:
    # An installed build may have been made for another torch: only the import tells.
    try:
        importlib.import_module("flash_attn")
    except Exception:
        return False
    return True


def tell_of_missing_flash_attn() -> None:
    logger.info("flash-attn cannot be imported: the model is loaded with transformers' default attention (sdpa)")


def flash_attn_works() -> bool:
    """Whether flash-attn can be imported; logs that the model gets transformers' own attention if not."""
    if not can_import_flash_attn():
        tell_of_missing_flash_attn()
        return False
    return True
