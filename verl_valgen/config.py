"""The settings of generation: their keys, defaults, variables and limits, and which of several sources wins.

Precedence: dotted command-line override > environment > configuration (YAML and groups) > default.

This module owns everything that a user can set. It knows neither trainer nor model; `hf_parameters.py` knows what
transformers makes of a parameter, `hydra_values.py` how a configuration is read, `checks.py` what one value may be.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from omegaconf import DictConfig

from verl_valgen import checks, hf_parameters
from verl_valgen.backends import BACKENDS
from verl_valgen.checks import Check, ConfigError, plain
from verl_valgen.hydra_values import as_omegaconf, keys_named_by, keys_under, select, task_overrides

__all__ = ["SETTINGS", "ConfigError", "GenerationSettings", "Setting", "load_settings", "task_overrides"]


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
        own = {name: getattr(self, name) for name in ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens")}
        unused = frozenset() if self.do_sample else hf_parameters.SAMPLING_ONLY
        return {name: value for name, value in {**own, **self.extra}.items() if name not in unused}


class Setting(NamedTuple):
    """What is known of one key."""

    check: Check
    variable: str | None = None


_TEMPERATURE = checks.number("a number > 0 (for greedy decoding set do_sample=false)", lambda x: x > 0)
_SHARE = checks.number("a number in (0, 1]", lambda x: 0 < x <= 1)
_CUTOFF = checks.number("a number in [0, 1) (0 switches it off)", lambda x: 0 <= x < 1)
_SEED = checks.integer("an integer in [0, 2**63)", lambda x: 0 <= x < 2**63)
_POSITIVE = checks.number("a number > 0", lambda x: x > 0)
_DTYPE = checks.one_of(
    *("auto", "float32", "bfloat16", "float16"),
    aliases={"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},  # verl's spellings
)

SETTINGS = {
    "generation.enabled": Setting(checks.boolean(), "VERL_GENERATION_ENABLED"),
    "generation.do_sample": Setting(checks.boolean(), "VERL_GENERATION_DO_SAMPLE"),
    "generation.temperature": Setting(_TEMPERATURE, "VERL_GENERATION_TEMPERATURE"),
    "generation.top_k": Setting(checks.at_least(0, "0 switches it off"), "VERL_GENERATION_TOP_K"),
    "generation.top_p": Setting(_SHARE, "VERL_GENERATION_TOP_P"),
    "generation.max_new_tokens": Setting(checks.at_least(1), "VERL_GENERATION_MAX_NEW_TOKENS"),
    "trainer.max_val_samples": Setting(checks.at_least(0, "0 switches generation off"), "VERL_MAX_VAL_SAMPLES"),
    "generation.seed": Setting(_SEED, "VERL_GENERATION_SEED"),
    "generation.dtype": Setting(_DTYPE),
    "generation.backend": Setting(checks.one_of("auto", *BACKENDS)),
    "generation.compile": Setting(checks.boolean()),
    "generation.batch_size": Setting(checks.auto_or(checks.at_least(1))),
    "generation.ranks": Setting(checks.auto_or(checks.at_least(1))),
    "generation.gather": Setting(checks.one_of("auto", "copy", "sharded")),
    "generation.max_round_time_s": Setting(checks.number("a number of seconds >= 0 (0: no limit)", lambda x: x >= 0)),
    "generation.max_log_chars": Setting(checks.at_least(16)),
    "generation.max_tracker_chars": Setting(checks.at_least(16)),
    # Fields of GenerationConfig that transformers checks only while it generates, if at all.
    "generation.min_p": Setting(checks.number("a number in [0, 1]", lambda x: 0 <= x <= 1)),
    "generation.typical_p": Setting(_SHARE),
    "generation.epsilon_cutoff": Setting(_CUTOFF),
    "generation.eta_cutoff": Setting(_CUTOFF),
    "generation.repetition_penalty": Setting(_POSITIVE),
    "generation.length_penalty": Setting(checks.number("a number", lambda _: True)),
    "generation.no_repeat_ngram_size": Setting(checks.at_least(0, "0 switches it off")),
    "generation.min_new_tokens": Setting(checks.at_least(0)),
    "generation.num_beams": Setting(checks.at_least(1)),
    "generation.max_time": Setting(checks.number("a number of seconds > 0", lambda x: x > 0)),
    "generation.top_h": Setting(_SHARE),
    "generation.guidance_scale": Setting(checks.number("a number", lambda _: True)),
    "generation.stop_strings": Setting(checks.texts()),
    "generation.use_cache": Setting(checks.boolean()),
    "generation.renormalize_logits": Setting(checks.boolean()),
    "generation.remove_invalid_values": Setting(checks.boolean()),
}

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
    return settings


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
    """transformers takes any name in silence, so that a misspelt parameter would be lost there."""
    known = {name: f"generation.{name}" for name in hf_parameters.field_names()} | _KEYS
    for key in keys:
        name = key.partition(".")[2]
        if name in hf_parameters.REFUSED:
            raise ConfigError(f"{key} is not supported: {hf_parameters.REFUSED[name]}")
        if key not in known.values():
            close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.7)
            hint = f"did you mean {known[close[0]]}?" if close else "transformers.GenerationConfig has no such field"
            raise ConfigError(f"unknown key {plain(key)}: {hint}")
