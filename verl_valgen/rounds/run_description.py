"""The entry of `runs.json` that says which run a folder of samples belongs to: date, names, versions, configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from omegaconf import OmegaConf

from verl_valgen.hosts.trainer_host import TrainerHost
from verl_valgen.settings.settings import GenerationSettings

_PACKAGES = ("verl-valgen", "verl", "torch", "transformers", "peft")


def describe_run(host: TrainerHost, settings: GenerationSettings, start_step: int) -> dict[str, Any]:
    """Describes a run in values that JSON holds. verl's configuration may hold secrets, and is not copied."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "start_step": start_step,
        "project": OmegaConf.select(host.config, "trainer.project_name"),
        "experiment": OmegaConf.select(host.config, "trainer.experiment_name"),
        "model": getattr(host.model_config, "_name_or_path", None),
        "val_files": _plain(OmegaConf.select(host.config, "data.val_files")),
        "generation": _plain(dataclasses.asdict(settings)),
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def _plain(value: Any) -> Any:
    """Nested mappings and sequences as dictionaries and lists."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
