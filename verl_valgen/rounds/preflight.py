"""Checks before the model is loaded: whether what the settings name is there, and can be used.

The settings themselves know values. What a value names (a backend, a metric, a strategy, a file) is looked for here,
once per process, and what has been read is handed on to the rounds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_valgen.backends import BACKENDS, check_parameters
from verl_valgen.backends.vllm.versions import why_not_installed
from verl_valgen.prompts.files import OwnPrompt, read_own_prompts
from verl_valgen.scores.metrics import METRICS, check_metrics
from verl_valgen.scores.metrics.functions import metric_name
from verl_valgen.scores.names import ALWAYS, DERIVED, FURTHER, RESERVED
from verl_valgen.settings.checks import ConfigError, Mistakes, check_rows_exist, plain, quoted
from verl_valgen.settings.hydra import as_omegaconf
from verl_valgen.settings.load import load_settings, task_overrides
from verl_valgen.settings.settings import GenerationSettings


@dataclass(frozen=True)
class Preflight:
    """A configuration that was checked, and what it took to check it."""

    config: Any
    """verl's whole configuration, the object itself."""
    settings: GenerationSettings
    file_prompts: Sequence[OwnPrompt] = ()
    """The prompts of the file that `generation.prompts` names, not tokenized yet; none with generation off."""
    snapshot: str = ""
    """The part of the configuration that the settings were read from."""

    def still_holds(self, config: Any) -> bool:
        """Whether a trainer's configuration is the one that was checked, and unchanged since."""
        return config is self.config and self.snapshot == _snapshot(config)


def preflight(config: DictConfig | Mapping[str, Any]) -> Preflight:
    """Reads and checks the configuration of somebody whose generates by hand: values are read with generation off too.

    Raises:
        ConfigError: Something is wrong; with a line for each mistake.
    """
    mistakes = Mistakes()
    settings = load_settings(config, os.environ, task_overrides(), read_when_off=True, mistakes=mistakes)
    checked = check_names(config, settings, mistakes)
    mistakes.raise_if_any()
    return checked


def check_names(config: Any, settings: GenerationSettings, mistakes: Mistakes) -> Preflight:
    """Looks for what the settings of a configuration name, unless generation is off, and reads the file of prompts.

    Args:
        mistakes: Those of the settings; what is not there is noted beside them.
    """
    file_prompts: Sequence[OwnPrompt] = ()
    with mistakes.noted():  # `generate_samples` takes one with generation off too
        _check_backend(settings.backend)
    if settings.enabled:
        with mistakes.noted():
            _check_installed(settings.backend)
        with mistakes.noted():
            check_metrics(settings.metrics, "generation.metrics")
        with mistakes.noted():
            _check_strategies(settings)
        if not mistakes.lines:  # what is wrong with a metric or a strategy would be told twice
            with mistakes.noted():
                _check_best_metric(settings)
            with mistakes.noted():
                _check_parameters(settings)
        with mistakes.noted():
            if settings.prompts:
                file_prompts = read_own_prompts(settings.prompts, settings.params_key)
    # A configuration with mistakes is not trained with, and may be one that cannot even be read.
    return Preflight(config, settings, file_prompts, "" if mistakes.lines else _snapshot(config))


def check_rows(settings: GenerationSettings, num_rows: int | None) -> None:
    """Raises `ConfigError` for rows beyond the validation data, which has `num_rows` as far as that is known."""
    are_asked = not (settings.prompts and settings.prompts_mode == "replace")
    if are_asked and num_rows is not None:
        check_rows_exist(settings.rows, num_rows, "generation.rows")


def _snapshot(config: Any) -> str:
    whole = as_omegaconf(config)
    read = [OmegaConf.select(whole, key, throw_on_missing=False) for key in ("generation", "trainer.max_val_samples")]
    return "\n".join(OmegaConf.to_yaml(part) if OmegaConf.is_config(part) else repr(part) for part in read)


def _check_backend(name: str) -> None:
    names = ("auto", *BACKENDS)
    if name not in names:
        raise ConfigError(f"generation.backend must be one of {', '.join(names)}, got {quoted(name)}")


def _check_installed(backend: str) -> None:
    """Refuses a backend whose package is not there, or does not go with what is."""
    if backend == "vllm" and (reason := why_not_installed()) is not None:
        raise ConfigError(reason)


def _check_parameters(settings: GenerationSettings) -> None:
    """Refuses parameters that the backend does not have, of the run and of each strategy."""
    mistakes = Mistakes()
    for name, params in (settings.strategies or {"": {}}).items():
        source = f"generation.strategies.{name}" if name else "generation"
        with mistakes.noted():
            check_parameters(settings.backend, settings.overridden(params, source).parameters, source)
    mistakes.raise_if_any()


def _check_strategies(settings: GenerationSettings) -> None:
    """Refuses the names of other numbers: those of a strategy are recorded under its name."""
    for name in settings.strategies:
        if name in (*RESERVED, *map(metric_name, settings.metrics)):
            raise ConfigError(f"generation.strategies: a round has a number called {plain(name)} already")


def _check_best_metric(settings: GenerationSettings) -> None:
    """Refuses what no round will have, as far as that is known: functions may give several scores."""
    if not settings.best_metric:
        return
    scope, _, name = settings.best_metric.rpartition("/")
    metrics = [metric_name(spec) for spec in settings.metrics]
    derived = DERIVED.fullmatch(name)
    is_known = (
        name in (*ALWAYS, *FURTHER, *metrics)
        or (derived is not None and derived[1] in metrics)
        or any(name.startswith(f"{metric}_") for metric in metrics if metric not in METRICS)
    )
    if not is_known:
        known = ", ".join([*metrics, *ALWAYS])
        form = ", as <strategy>/<number>" if settings.strategies else ""
        raise ConfigError(
            f"generation.best_metric must be one of {plain(known, 300)}{form}, got {quoted(settings.best_metric)}"
        )
    if not scope and settings.strategies:
        names = ", ".join(f"{strategy}/{name}" for strategy in settings.strategies)
        raise ConfigError(
            f"generation.best_metric={plain(name)}: with generation.strategies it must name one of them: "
            f"{plain(names, 300)}"
        )
    if scope and scope not in settings.strategies and not scope.startswith("by_source/"):
        names = ", ".join(settings.strategies)
        there_are = f"generation.strategies has {plain(names, 300)}" if names else "generation.strategies is not set"
        raise ConfigError(
            f"generation.best_metric: there is no strategy {plain(scope)} ({there_are}), "
            f"got {quoted(settings.best_metric)}"
        )


def notes_on_ignored_settings(settings: GenerationSettings) -> Iterator[str]:
    """Explains which settings have no effect: `n` or `best_of` where nothing is sampled, and each answer would be the
    same; an end of reasoning where reasoning stays."""
    if settings.reasoning_end and settings.reasoning == "keep":
        yield "generation.reasoning_end has no effect with generation.reasoning=keep"
    strategies = settings.strategies or {"": {}}
    greedy = [name for name, params in strategies.items() if not settings.overridden(params, name).do_sample]
    if greedy:
        whose = f"strategies that do not sample ({', '.join(greedy)})" if settings.strategies else "do_sample=false"
        for name, value in (("n", settings.n), ("best_of", settings.best_of)):
            if value > 1:
                yield f"generation.{name}={value} has no effect with {whose}: one answer per prompt"
