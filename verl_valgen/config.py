"""The settings of generation: their keys, defaults, variables and limits, and which of several sources wins.

Precedence: dotted command-line override > environment > configuration (YAML and groups) > default.

This module owns everything that a user can set. It knows neither trainer nor model; `keys.py` lists the keys,
`hf_parameters.py` knows what transformers makes of a parameter, `hydra_values.py` how a configuration is read,
`checks.py` what one value may be.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from verl_valgen import checks, hf_parameters
from verl_valgen.checks import ConfigError, plain, quoted
from verl_valgen.hydra_values import as_omegaconf, keys_named_by, keys_under, select, task_overrides
from verl_valgen.keys import SETTINGS

__all__ = ["SETTINGS", "ConfigError", "GenerationSettings", "load_settings", "task_overrides"]

_OWN_PARAMETERS = ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens")
"""The fields of `transformers.GenerationConfig` that have a default of ours."""


@dataclass(frozen=True)
class GenerationSettings:
    """What is generated at each validation, checked. Generation parameters have Hugging Face's names and meanings."""

    enabled: bool
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 50
    """0 switches it off."""
    top_p: float = 0.7
    """1.0 switches it off."""
    max_new_tokens: int = 100
    max_val_samples: int = 5
    """Number of validation prompts to answer. The key is `trainer.max_val_samples`."""
    n: int = 1
    """Completions of each prompt, where they are sampled."""
    best_of: int = 1
    """Each completion is the likeliest of so many by its tokens' mean log-probability."""
    strategies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> parameters on top of these. Every prompt is answered under each."""
    params_key: str = "generation_params"
    """Column of the validation data with a row's own parameters."""
    turn: str = "last"
    """Which of a conversation's assistant turns are answered: last, first, all."""
    prompts: str = ""
    """A file of prompts; "": none."""
    prompts_mode: str = "replace"
    """Whether they replace those of the validation data or are appended to them."""
    before_train: bool = False
    """Whether there is a round at the step that training starts from."""
    every: int = 1
    """A round at every so many validations, and at the last one."""
    metrics: Sequence[str] = field(default_factory=list)
    """Names of `metrics.METRICS`, or functions as `file.py:function` and `module:function`."""
    best_metric: str = ""
    """The scalar whose best value is kept; "": none."""
    best_mode: str = "max"
    seed: int = 0
    dtype: str = "auto"
    """A torch dtype by name; auto: the trainer's compute dtype on accelerators, float32 on CPU."""
    backend: str = "auto"
    compile: bool = False
    """Whether the `fast` backend's step goes through torch.compile."""
    batch_size: int | str = "auto"
    """Most prompts answered at once on one rank; auto: by free memory."""
    ranks: int | str = "auto"
    """Most ranks that answer; auto: as many as there are full batches."""
    gather: str = "auto"
    """How the weights are come by. copy: a plain copy on each rank that answers; sharded: through the sharded model, on
    all ranks; auto: sharded where no copy fits."""
    max_round_time_s: float = 0.0
    """What is unfinished then ends with the reason "time"; 0 sets no limit."""
    max_log_chars: int = 500
    """Longer texts are cut on the console."""
    max_tracker_chars: int = 4000
    """Longer texts are cut in trackers."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Any other field of `transformers.GenerationConfig`, by names that `load_settings` checks. None is dropped: there
    it means "not set"."""

    def __post_init__(self) -> None:
        for name in _OWN_NAMES:
            object.__setattr__(self, name, _check(_KEYS[name], getattr(self, name)))
        given = {f"generation.{name}": value for name, value in self.extra.items() if value is not None}
        extra = {key.removeprefix("generation."): _check(key, value) for key, value in given.items()}
        object.__setattr__(self, "extra", extra)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that are in force, as `transformers.GenerationConfig` takes them.

        With do_sample false, those that only sampling uses are left out: transformers would warn of them.
        """
        own = {name: getattr(self, name) for name in _OWN_PARAMETERS}
        unused = frozenset() if self.do_sample else hf_parameters.SAMPLING_ONLY
        return {name: value for name, value in {**own, **self.extra}.items() if name not in unused}

    def overridden(self, params: Mapping[str, Any], source: str) -> GenerationSettings:
        """These settings with other generation parameters (`best_of` among them), checked as those of a run are.

        Args:
            params: None unsets a parameter that has no default of ours.
            source: Where they come from, for errors.

        Raises:
            ConfigError: One is unknown, refused or wrong, or they do not go together.
        """
        if not params:
            return self
        for name in params:
            key = f"generation.{name}"
            if name in _KEYS and name not in (*_OWN_PARAMETERS, "best_of"):
                raise ConfigError(f"{source}: {plain(str(name))} is set once for the run, as {_KEYS[name]}")
            _check_name(key, f"{source}.{plain(str(name))}")
        own, extra = {}, dict(self.extra)
        for name, value in params.items():
            if name in _KEYS:
                own[name] = _check(f"generation.{name}", value, f"{source}.{name}")
            else:
                extra[name] = None if value is None else _check(f"generation.{name}", value, f"{source}.{name}")
        changed: dict[str, Any] = {**own, "extra": extra}
        result = dataclasses.replace(self, **changed)
        hf_parameters.check(result.parameters, source)
        return result


_OWN_NAMES = [f.name for f in dataclasses.fields(GenerationSettings) if f.name != "extra"]
_KEYS = {_name: next(key for key in SETTINGS if key.endswith(f".{_name}")) for _name in _OWN_NAMES}
_VARIABLES = {setting.variable: key for key, setting in SETTINGS.items() if setting.variable}
_ANYTHING = checks.finite()


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
        return _check(key, select(whole, key) if source == key else environ[source], source)

    if "generation.enabled" in sources:
        enabled = checked("generation.enabled")
    else:
        enabled = in_block is not None or bool(in_environment)
    if enabled and "trainer.max_val_samples" in sources:
        enabled = checked("trainer.max_val_samples") > 0
    if not enabled and not read_when_off:
        return GenerationSettings(enabled=False)

    _check_names(sources)
    own = {name: checked(key) for name, key in _KEYS.items() if key in sources}
    extra = {key.removeprefix("generation."): select(whole, key) for key in sources if key not in _KEYS.values()}
    settings = GenerationSettings(**{**own, "enabled": enabled}, extra=extra)
    hf_parameters.check(settings.parameters)
    _check_what_is_named(settings)
    for name, params in settings.strategies.items():
        settings.overridden(params, f"generation.strategies.{name}")
    return settings


def _check_what_is_named(settings: GenerationSettings) -> None:
    """Refuses metrics and files that cannot be used."""
    # What is used with generation on alone is loaded then alone.
    from verl_valgen.metrics import check_metrics
    from verl_valgen.own_prompts import read_own_prompts

    check_metrics(settings.metrics, "generation.metrics")
    if settings.best_metric:
        _check_best_metric(settings)
    if settings.prompts:
        read_own_prompts(settings.prompts, settings.params_key)


def _check_best_metric(settings: GenerationSettings) -> None:
    """Refuses what no round will have, as far as that is known: functions may give several scores."""
    from verl_valgen.aggregates import ALWAYS
    from verl_valgen.metrics.own import metric_name

    scope, _, name = settings.best_metric.rpartition("/")
    metrics = [metric_name(spec) for spec in settings.metrics]
    is_known = name in ALWAYS or any(f"{name}_".startswith(f"{metric}_") for metric in metrics)
    if not is_known or (scope and scope not in settings.strategies and not scope.startswith("by_source/")):
        known = ", ".join([*metrics, *ALWAYS])
        raise ConfigError(
            f"generation.best_metric must be one of {plain(known, 300)}, alone or as <strategy>/<metric>, "
            f"got {quoted(settings.best_metric)}"
        )


def _check(key: str, value: object, source: str | None = None) -> Any:
    """The value as the key wants it; errors name `source`, or else the key."""
    check = SETTINGS[key].check if key in SETTINGS else _ANYTHING
    return check(value, source or plain(key))


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
    hints = {name: f"it is set as ++generation.{name}=..." for name in hf_parameters.field_names()}
    for name, key in _KEYS.items():
        own = SETTINGS[key].variable
        hints[name] = f"did you mean {own}?" if own else f"it is set as ++{key}=..."
    name = variable.removeprefix("VERL_").removeprefix("GENERATION_").lower()
    close = difflib.get_close_matches(name[:100], hints, n=1, cutoff=0.7)
    return hints[close[0]] if close else f"there are {', '.join(_VARIABLES)}"


def _check_names(keys: Iterable[str]) -> None:
    for key in keys:
        _check_name(key, plain(key))


def _check_name(key: str, shown: str) -> None:
    """transformers takes any name in silence, so that a misspelt parameter would be lost there."""
    name = key.partition(".")[2]
    if name in hf_parameters.REFUSED:
        raise ConfigError(f"{shown} is not supported: {hf_parameters.REFUSED[name]}")
    known = {name: f"generation.{name}" for name in hf_parameters.field_names()} | _KEYS
    if key not in known.values():
        close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.7)
        hint = f"did you mean {known[close[0]]}?" if close else "transformers.GenerationConfig has no such field"
        raise ConfigError(f"unknown key {shown}: {hint}")
