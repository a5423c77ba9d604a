"""Reads a composed Hydra configuration: keys, values, and which of them the command line has set.

This module knows OmegaConf and Hydra's override grammar. It does not know what the keys mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_valgen.settings.checks import ConfigError, plain, quoted


def task_overrides() -> list[str]:
    """The command line's overrides as Hydra holds them; [] where the program was not started by Hydra."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def as_omegaconf(config: DictConfig | Mapping[str, Any]) -> DictConfig:
    with _reading("the configuration"):
        return (
            config if isinstance(config, DictConfig) else OmegaConf.create(dict(config), flags={"allow_objects": True})
        )


def select(config: DictConfig, key: str) -> Any:
    """The value at `key` as plain Python, interpolations resolved."""
    with _reading(key):
        node = OmegaConf.select(config, key, throw_on_missing=True)
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node


def keys_under(section: str, config: DictConfig) -> list[str] | None:
    """The full keys under a section, whose values are not looked at yet; None where it is absent or null."""
    with _reading(section):
        node = OmegaConf.select(config, section, throw_on_missing=True)
    if node is None:
        return None
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{section} must be a mapping of names to values, got {quoted(node)}")
    return [f"{section}.{name!s}" for name in node]


def keys_named_by(overrides: Sequence[str]) -> set[str]:
    """The keys, down to the second level, that dotted overrides set: `a.b=1` and `a={b: 1}`.

    The choice of a group's option (`generation=greedy`) sets none. Hydra tells them apart in the same way: a dictionary
    is a value, anything else is the name of an option.
    """
    keys = set()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        value, key = override.value(), override.key_or_group
        paths = [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
        keys |= {".".join(path.split(".")[:2]) for path in paths if "." in path}
    return keys


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns OmegaConf's errors into `ConfigError`: wherever it reads a value, an interpolation can fail."""
    try:
        yield
    except OmegaConfBaseException as error:
        first_line = str(error).partition("\n")[0]
        where = "" if not error.full_key or what.startswith(error.full_key) else f"{plain(error.full_key)}: "
        raise ConfigError(f"{what} cannot be read: {where}{plain(first_line, 300)}") from error
