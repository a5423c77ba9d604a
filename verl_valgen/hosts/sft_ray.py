"""The host for `verl.trainer.sft_trainer_ray.SFTTrainer`, verl 0.7 to 0.9: the driver of workers with the engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import GenerationConfig, PretrainedConfig

from verl_valgen.hosts import cpu_ray
from verl_valgen.hosts.engine_trainer import EngineTrainerHost
from verl_valgen.hosts.workers import BrokenGroupError, Workers
from verl_valgen.patching import patched
from verl_valgen.settings.checks import ConfigError

_OF_IMPORTING = re.compile(
    "ModuleNotFoundError: No module named 'verl_valgen"
    "|ImportError: .*'verl_valgen"
    "|AttributeError: .*module 'verl_valgen"
)
"""What Python says in a worker that is sent what its package does not have."""


class RaySFTHost(EngineTrainerHost):
    """verl's trainer whose engine is in Ray's workers.

    Raises:
        TypeError: The workers are of a class that `while_building` did not reach.
    """

    is_spmd = False
    answerer = "verl_valgen.rounds.remote:RemoteAnswerer"
    is_logging_rank = True
    device = torch.device("cpu")  # nothing is computed in the driver, which must not initialise CUDA

    def __init__(self, trainer: Any) -> None:
        from ray.exceptions import RayError

        super().__init__(trainer)
        if not hasattr(trainer.training_client, "valgen_set_up"):
            raise TypeError(
                f"the workers of {type(trainer).__name__} cannot answer: a `_build_engine` of one's own must take the "
                "class of its workers from verl's module, as `verl.trainer.sft_trainer_ray.TrainingWorker`, when called"
            )
        self.workers = Workers(trainer.training_client)
        self.fatal_errors = (RayError, BrokenGroupError)

    def set_up_workers(self, make_part: Callable[..., Any], *args: Any) -> None:
        """See `Workers.set_up`."""
        with _other_packages_told():
            self.workers.set_up(make_part, *args)

    @property
    def model_config(self) -> PretrainedConfig:
        return self.verl_model_config.hf_config

    @property
    def generation_config(self) -> GenerationConfig | None:
        return self.verl_model_config.generation_config

    def why_not_generating(self) -> str | None:
        return self.workers.call("why_not_generating")

    @classmethod
    def _num_loaders(cls, num_data_ranks: int) -> int:
        return 1

    @classmethod
    @contextmanager
    def launch_support(cls, module: ModuleType, config: DictConfig) -> Iterator[None]:
        with ExitStack() as stack:
            if not cls.has_accelerator(module):
                from verl_valgen.hosts.ray_worker import on_cpu

                stack.enter_context(cpu_ray.driver_support(module, config, on_cpu(module.TrainingWorker)))
            cls._do_without_flash_attn(config)  # for all workers, as they get the model's configuration from here
            yield

    @classmethod
    @contextmanager
    def while_building(cls, module: ModuleType) -> Iterator[None]:
        from verl_valgen.hosts.ray_worker import answering

        with _other_packages_told(), patched(module, "TrainingWorker", answering(module.TrainingWorker)):
            yield


@contextmanager
def _other_packages_told() -> Iterator[None]:
    """Turns Ray's errors about a node that cannot import what it is sent into one line.

    Raises:
        ConfigError: There is none of this package, or another.
    """
    from ray.exceptions import RayError

    try:
        yield
    except RayError as e:
        if _OF_IMPORTING.search(str(e)):
            raise ConfigError(
                "a worker's node lacks verl-valgen, or has another version of it: install it on every node, in the "
                "environment that Ray's workers run in"
            ) from e
        raise
