"""Where the settings of generation come from, and which of several sources wins.

Precedence: dotted command-line override > environment > configuration (YAML and groups) > default.

This module knows neither trainer nor model. `settings.py` has the settings as they are used, `keys.py` lists the keys,
`hydra_values.py` knows how a configuration is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from verl_valgen.settings import generation_config
from verl_valgen.settings.checks import ConfigError, plain, quoted
from verl_valgen.settings.hydra import as_omegaconf, keys_named_by, keys_under, select, task_overrides
from verl_valgen.settings.keys import SETTINGS
from verl_valgen.settings.settings import KEYS, GenerationSettings, check_name, check_value

__all__ = ["SETTINGS", "ConfigError", "GenerationSettings", "load_settings", "task_overrides"]

_VARIABLES = {setting.variable: key for key, setting in SETTINGS.items() if setting.variable}


def load_settings(
    config: DictConfig | Mapping[str, Any],
    environ: Mapping[str, str],
    overrides: Sequence[str] = (),
    *,
    read_when_off: bool = False,
) -> GenerationSettings:
    """The settings of a run: `config` is verl's whole composed configuration, `overrides` what `task_overrides` gives.

    Raises `ConfigError`. When generation is off, values are not looked at and the other fields are the defaults, unless
    `read_when_off` is set. Misspelt variables are errors even then: the misspelt one may be what should have switched
    generation on.
    """
    whole = as_omegaconf(config)
    in_block, in_trainer = keys_under("generation", whole), keys_under("trainer", whole)
    in_config = [*(in_block or ()), *(key for key in in_trainer or () if key in SETTINGS)]  # the rest of it is verl's
    in_environment = _variables_in(environ)
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
        return check_value(key, select(whole, key) if source == key else environ[source], source)

    if "generation.enabled" in sources:
        enabled = checked("generation.enabled")
    else:
        enabled = in_block is not None or bool(in_environment)
    if enabled and "trainer.max_val_samples" in sources:
        enabled = checked("trainer.max_val_samples") > 0
    if not enabled and not read_when_off:
        return GenerationSettings(enabled=False)

    for key in sources:
        check_name(key, plain(key))
    own = {name: checked(key) for name, key in KEYS.items() if key in sources}
    extra = {key.removeprefix("generation."): select(whole, key) for key in sources if key not in KEYS.values()}
    settings = GenerationSettings(**{**own, "enabled": enabled}, extra=extra)
    generation_config.check(settings.parameters)
    if enabled:
        _check_what_is_named(settings)
    for name, params in settings.strategies.items():
        settings.overridden(params, f"generation.strategies.{name}")
    return settings


def _check_what_is_named(settings: GenerationSettings) -> None:
    """Refuses metrics and files that cannot be used."""
    # What is used with generation on alone is loaded then alone.
    from verl_valgen.prompts.files import read_own_prompts
    from verl_valgen.scores.metrics import check_metrics
    from verl_valgen.scores.metrics.functions import metric_name
    from verl_valgen.scores.names import RESERVED

    check_metrics(settings.metrics, "generation.metrics")
    for name in settings.strategies:
        if name in (*RESERVED, *map(metric_name, settings.metrics)):
            raise ConfigError(f"generation.strategies: a round has a number called {plain(name)} already")
    if settings.best_metric:
        _check_best_metric(settings)
    if settings.prompts:
        read_own_prompts(settings.prompts, settings.params_key)


def _check_best_metric(settings: GenerationSettings) -> None:
    """Refuses what no round will have, as far as that is known: functions may give several scores."""
    from verl_valgen.scores.metrics import METRICS
    from verl_valgen.scores.metrics.functions import metric_name
    from verl_valgen.scores.names import ALWAYS, DERIVED

    scope, _, name = settings.best_metric.rpartition("/")
    metrics = [metric_name(spec) for spec in settings.metrics]
    derived = DERIVED.fullmatch(name)
    is_known = (
        name in (*ALWAYS, "mean_logprob", *metrics)
        or (derived is not None and derived[1] in metrics)
        or any(name.startswith(f"{metric}_") for metric in metrics if metric not in METRICS)
    )
    if not is_known or (scope and scope not in settings.strategies and not scope.startswith("by_source/")):
        known = ", ".join([*metrics, *ALWAYS])
        raise ConfigError(
            f"generation.best_metric must be one of {plain(known, 300)}, alone or as <strategy>/<metric>, "
            f"got {quoted(settings.best_metric)}"
        )


def _variables_in(environ: Mapping[str, str]) -> dict[str, str]:
    """Key -> variable for those of our variables that are set; an empty one is not. Refuses misspelt ones."""
    variables = sorted(name for name, text in environ.items() if text.strip())
    for name in variables:
        if name not in _VARIABLES:
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
    for name, key in KEYS.items():
        own = SETTINGS[key].variable
        hints[name] = f"did you mean {own}?" if own else f"it is set as ++{key}=..."
    name = variable.removeprefix("VERL_").removeprefix("GENERATION_").lower()
    close = difflib.get_close_matches(name[:100], hints, n=1, cutoff=0.7)
    return hints[close[0]] if close else f"there are {', '.join(_VARIABLES)}"
