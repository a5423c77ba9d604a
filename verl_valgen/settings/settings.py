"""The settings of generation as they are used: their defaults, checked, and with the parameters of a strategy or a row.

This module knows what goes together. `keys.py` lists the keys, `generation_config.py` knows what transformers makes of
a parameter, `load.py` where the values come from.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_valgen.settings import checks, generation_config
from verl_valgen.settings.checks import ConfigError, plain
from verl_valgen.settings.keys import SETTINGS

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
    """Number of rows of the validation data to answer. The key is `trainer.max_val_samples`."""
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
    """Names of `metrics.METRICS`, or functions as `file.py:function`, `module:function`, `name=module:function`."""
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
            object.__setattr__(self, name, check_value(KEYS[name], getattr(self, name)))
        given = {f"generation.{name}": value for name, value in self.extra.items() if value is not None}
        extra = {key.removeprefix("generation."): check_value(key, value) for key, value in given.items()}
        object.__setattr__(self, "extra", extra)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that are in force, as `transformers.GenerationConfig` takes them.

        With do_sample false, those that only sampling uses are left out: transformers would warn of them.
        """
        own = {name: getattr(self, name) for name in _OWN_PARAMETERS}
        unused = frozenset() if self.do_sample else generation_config.SAMPLING_ONLY
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
            if name in KEYS and name not in (*_OWN_PARAMETERS, "best_of"):
                raise ConfigError(f"{source}: {plain(str(name))} is set once for the run, as {KEYS[name]}")
            check_name(key, f"{source}.{plain(str(name))}")
        own, extra = {}, dict(self.extra)
        for name, value in params.items():
            if name in KEYS:
                own[name] = check_value(f"generation.{name}", value, f"{source}.{name}")
            else:
                extra[name] = None if value is None else check_value(f"generation.{name}", value, f"{source}.{name}")
        changed: dict[str, Any] = {**own, "extra": extra}
        result = dataclasses.replace(self, **changed)
        generation_config.check(result.parameters, source)
        return result


_OWN_NAMES = [f.name for f in dataclasses.fields(GenerationSettings) if f.name != "extra"]
KEYS = {_name: next(key for key in SETTINGS if key.endswith(f".{_name}")) for _name in _OWN_NAMES}
"""Field -> key."""
_ANYTHING = checks.finite()


def check_value(key: str, value: object, source: str | None = None) -> Any:
    """The value as the key wants it; errors name `source`, or else the key."""
    check = SETTINGS[key].check if key in SETTINGS else _ANYTHING
    return check(value, source or plain(key))


def check_name(key: str, shown: str) -> None:
    """transformers takes any name in silence, so that a misspelt parameter would be lost there."""
    name = key.partition(".")[2]
    if name in generation_config.REFUSED:
        raise ConfigError(f"{shown} is not supported: {generation_config.REFUSED[name]}")
    known = {name: f"generation.{name}" for name in generation_config.field_names()} | KEYS
    if key not in known.values():
        close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.7)
        hint = f"did you mean {known[close[0]]}?" if close else "transformers.GenerationConfig has no such field"
        raise ConfigError(f"unknown key {shown}: {hint}")
