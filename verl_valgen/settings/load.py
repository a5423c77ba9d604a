"""Where the settings of generation come from, and which of several sources wins.

Precedence: dotted command-line override > environment > configuration (YAML and groups) > default.

This module knows neither trainer nor model. `settings.py` declares the keys, `hydra.py` knows how a configuration is
read.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from verl_valgen.settings import generation_config
from verl_valgen.settings.checks import ConfigError, Mistakes, plain, quoted
from verl_valgen.settings.hydra import as_omegaconf, keys_named_by, keys_under, select, task_overrides
from verl_valgen.settings.settings import (
    SETTINGS,
    GenerationSettings,
    check_name,
    check_overrides,
    check_value,
    known_keys,
)

__all__ = ["SETTINGS", "ConfigError", "GenerationSettings", "load_settings", "task_overrides"]

_VARIABLES = {setting.variable: key for key, setting in SETTINGS.items() if setting.variable}


def load_settings(
    config: DictConfig | Mapping[str, Any],
    environ: Mapping[str, str],
    overrides: Sequence[str] = (),
    *,
    read_when_off: bool = False,
    mistakes: Mistakes | None = None,
) -> GenerationSettings:
    """The settings of a run.

    When generation is off, values are not looked at and the other fields are the defaults. Misspelt variables are
    mistakes even then: the misspelt one may be what should have switched generation on.

    Args:
        config: verl's whole composed configuration.
        overrides: The command line's, as `task_overrides` gives them.
        read_when_off: Whether values are read and checked with generation off as well.
        mistakes: Notes what is wrong, so that more can be checked before all of it is told; settings that are wrong
            have their defaults then.

    Raises:
        ConfigError: Something is wrong, and no `mistakes` were given; with a line for each mistake.
    """
    collected = Mistakes() if mistakes is None else mistakes
    settings = GenerationSettings(enabled=False)
    in_environment = _variables_in(environ, collected)
    with collected.noted():
        settings = _load(as_omegaconf(config), environ, in_environment, overrides, read_when_off, collected)
    if mistakes is None:
        collected.raise_if_any()
    return settings


def _load(
    config: DictConfig,
    environ: Mapping[str, str],
    in_environment: Mapping[str, str],
    overrides: Sequence[str],
    read_when_off: bool,
    mistakes: Mistakes,
) -> GenerationSettings:
    """The settings, with the defaults for wrong ones. Raises `ConfigError` where the configuration cannot be read."""
    in_block, in_trainer = keys_under("generation", config), keys_under("trainer", config)
    in_config = [*(in_block or ()), *(key for key in in_trainer or () if key in SETTINGS)]  # the rest of it is verl's
    on_command_line = keys_named_by(overrides)
    # Where each value comes from: a variable, or the key itself. Hydra has applied the overrides already, so the
    # command line's values stand in the configuration too, and the keys that it deleted do not.
    sources = {
        **{key: key for key in in_config},
        **in_environment,
        **{key: key for key in in_config if key in on_command_line},
    }

    def checked(key: str) -> Any:
        source = sources[key]
        value = select(config, key) if source == key else environ[source]
        # transformers' own fields are None where they are not set.
        return None if value is None and key not in SETTINGS else check_value(key, value, plain(source))

    enabled = in_block is not None or bool(in_environment)
    with mistakes.noted():  # with a switch that cannot be read, all else is looked at
        if "generation.enabled" in sources:
            enabled = checked("generation.enabled")
        if enabled and "trainer.max_val_samples" in sources:
            enabled = checked("trainer.max_val_samples") > 0
    if not enabled and not read_when_off:
        return GenerationSettings(enabled=False)

    num_before = len(mistakes.lines)
    own: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    known = known_keys()
    for key in sources:
        section, _, name = key.partition(".")
        with mistakes.noted():
            check_name(section, name, known)
            (own if key in SETTINGS else extra)[name] = checked(key)
    settings = GenerationSettings(**{**own, "enabled": enabled}, extra=extra)
    # Beside a wrong value its default stands, which may fit the others no better.
    _check_together(settings, mistakes, values_are_right=len(mistakes.lines) == num_before)
    return settings


def _check_together(settings: GenerationSettings, mistakes: Mistakes, *, values_are_right: bool) -> None:
    """Notes parameters that do not go together, of the run and of each strategy."""
    num_before = len(mistakes.lines)
    if values_are_right:
        with mistakes.noted():
            generation_config.check(settings.parameters)
        with mistakes.noted():
            _check_overlap(settings)
        with mistakes.noted():
            _check_engine(settings)
    is_right_so_far = values_are_right and len(mistakes.lines) == num_before
    for name, params in settings.strategies.items():
        source = f"generation.strategies.{name}"
        with mistakes.noted():
            if is_right_so_far:
                settings.overridden(params, source)
            else:
                check_overrides(params, source)


def _check_overlap(settings: GenerationSettings) -> None:
    """Refuses what would have more than one rank answer while training goes on: they would meet in collectives."""
    if not settings.overlap:
        return
    if settings.gather == "sharded":
        raise ConfigError(
            "generation.overlap=true answers with a copy of the model, as the sharded one is in training then: "
            "generation.gather must be auto or copy, got 'sharded'"
        )
    if settings.ranks not in ("auto", 1):
        raise ConfigError(
            "generation.overlap=true answers on one rank: generation.ranks must be auto (rounds for which training "
            f"waits may take more) or 1, got {settings.ranks}"
        )


def _check_engine(settings: GenerationSettings) -> None:
    """Refuses what belongs to one kind of backend beside one of the other kind."""
    if settings.backend == "vllm" and settings.gather == "sharded":
        raise ConfigError(
            "generation.backend=vllm has weights of its own: generation.gather must be auto or copy, got 'sharded'"
        )
    if settings.backend != "vllm" and settings.tensor_parallel != "auto":
        raise ConfigError(
            f"generation.tensor_parallel={settings.tensor_parallel} is for generation.backend=vllm, "
            f"got {quoted(settings.backend)}"
        )


def _variables_in(environ: Mapping[str, str], mistakes: Mistakes) -> dict[str, str]:
    """Key -> variable for those of our variables that are set; an empty one is not. Notes misspelt ones."""
    variables = sorted(name for name, text in environ.items() if text.strip())
    for name in variables:
        if name not in _VARIABLES:
            with mistakes.noted():
                _refuse_misspelt(name)
    return {_VARIABLES[name]: name for name in variables if name in _VARIABLES}


def _refuse_misspelt(variable: str) -> None:
    """Raises for a variable that must be meant for us, and leaves verl's own and everybody else's alone."""
    if variable.startswith(("VERL_GENERATION_", "VERL_MAX_VAL")):
        raise ConfigError(f"unknown environment variable {plain(variable)}: {_hint_for_variable(variable)}")
    close = difflib.get_close_matches(variable, _VARIABLES, n=1, cutoff=0.85) if variable.startswith("VERL_") else []
    if close:
        raise ConfigError(f"unknown environment variable {plain(variable)}: did you mean {close[0]}?")


def _hint_for_variable(variable: str) -> str:
    hints = {name: f"it is set as ++generation.{name}=..." for name in generation_config.field_names()}
    for key, setting in SETTINGS.items():
        hints[setting.name] = f"did you mean {setting.variable}?" if setting.variable else f"it is set as ++{key}=..."
    name = variable.removeprefix("VERL_").removeprefix("GENERATION_").lower()
    close = difflib.get_close_matches(name[:100], hints, n=1, cutoff=0.7)
    return hints[close[0]] if close else f"there are {', '.join(_VARIABLES)}"
