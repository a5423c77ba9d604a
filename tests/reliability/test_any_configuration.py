"""Whatever is configured: settings that keep their bounds, or a `ConfigError` that says where, in one harmless line."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from verl_valgen.records import Prompt, Request, RowData, pack, unpack
from verl_valgen.rounds.preflight import check_names
from verl_valgen.rounds.queries import make_queries
from verl_valgen.settings import generation_config
from verl_valgen.settings.checks import ConfigError, Mistakes
from verl_valgen.settings.load import SETTINGS, GenerationSettings, load_settings

PROFILE = settings.get_profile("reliability")
VARIABLES = [setting.variable for setting in SETTINGS.values() if setting.variable]
CHECKED = {*(setting.name for setting in SETTINGS.values()), *generation_config.CHECKS}
PARAMETERS = sorted({*CHECKED, *generation_config.field_names(), *generation_config.REFUSED})
GLOBAL = GenerationSettings(enabled=True)


class Hostile:
    """An object whose text steers a terminal."""

    def __repr__(self) -> str:
        return "\x1b[2J\n\u202e\ud800" + "x" * 1000


class Unprintable:
    """An object that has no text."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


class Awkward(Enum):
    """Values that Hypothesis could not print; `real` puts them in."""

    HOSTILE = partial(Hostile)
    UNPRINTABLE = partial(Unprintable)
    HUGE = partial(pow, 10, 5000)
    NESTED = partial(nested, 60)
    DEEP = partial(nested, 3000)  # not in a configuration: OmegaConf itself holds a hundred levels


def real(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: real(item) for key, item in value.items()}
    if isinstance(value, list):
        return [real(item) for item in value]
    return value.value() if isinstance(value, Awkward) else value


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
NASTY_TEXTS = st.sampled_from(
    [
        *(
            "",
            " ",
            "???",
            "${",
            "${}",
            "${nowhere}",
            "${oc.env:NOWHERE}",
            "${generation}",
            "${generation.top_k}",
            "${.}",
        ),
        *("nan", "inf", "1e999", "-0", "1e-400", "٥", "5_0", "0x10", "9" * 5000, "true", "null", "auto", "x" * 9999),
        *("a:b", ":", "x.py:f", "\x00.py:f", "\ud800.py:f", "x" * 300 + ".py:f", "\x1b[31m", "\ud800", "\x00", "a\nb"),
    ]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 2**63, -(2**63), 10**30, 10**400])
OBJECTS = (
    st.sampled_from([Path("\x1b"), np.arange(40).reshape(4, 10), datetime.date(2020, 1, 1), 1j])
    | st.binary(max_size=4)
    | st.sampled_from([Awkward.HOSTILE, Awkward.UNPRINTABLE, Awkward.HUGE, Awkward.NESTED])
)
SCALARS = st.none() | st.booleans() | NUMBERS | NASTY_TEXTS | ANY_TEXT | OBJECTS
KEYS = st.integers() | st.booleans() | st.none() | st.binary(max_size=2) | st.tuples(st.integers())
NAMES = st.sampled_from(PARAMETERS) | ANY_TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | KEYS, inner, max_size=3),
    max_leaves=6,
)


# What the documentation says of each key, once more, by somebody who does not read the code.
def _one_of(*names: Any) -> Any:
    return lambda value: value in names


def _integer(low: int) -> Any:
    return lambda value: type(value) is int and low <= value < 2**63


def _number(accepts: Any) -> Any:
    return lambda value: type(value) is float and math.isfinite(value) and accepts(value)


def _is_boolean(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return type(value) is str


def _are_texts(value: Any) -> bool:
    return type(value) is list and all(type(text) is str and text for text in value)


def _are_rows(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_integer(0), value)) and len(set(value)) == len(value)
    return value in ("batches", "first") or (value.keys() == {"per_source"} and _integer(1)(value["per_source"]))


_is_positive, _is_share = _number(lambda x: x > 0), _number(lambda x: 0 < x <= 1)
_is_cutoff = _number(lambda x: 0 <= x < 1)
BOUNDS: dict[str, Any] = {
    **dict.fromkeys(("enabled", "do_sample", "compile", "before_train", "use_cache"), _is_boolean),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values"), _is_boolean),
    **dict.fromkeys(("temperature", "repetition_penalty", "max_time"), _is_positive),
    **dict.fromkeys(("top_p", "typical_p", "top_h"), _is_share),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), _is_cutoff),
    **dict.fromkeys(("length_penalty", "guidance_scale"), _number(lambda _: True)),
    **dict.fromkeys(("top_k", "max_val_samples", "seed", "no_repeat_ngram_size", "min_new_tokens"), _integer(0)),
    **dict.fromkeys(("max_new_tokens", "n", "best_of", "every", "num_beams"), _integer(1)),
    "aggregates": _one_of("main", "all"),
    "console": _one_of("full", "samples", "brief", "none"),
    "console_prompts": _integer(1),
    "page": _is_boolean,
    "page_to_trackers": _is_boolean,
    "mlflow_tags": _integer(0),
    **dict.fromkeys(("max_log_chars", "max_tracker_chars"), _integer(16)),
    **dict.fromkeys(("batch_size", "ranks", "tensor_parallel"), lambda value: value == "auto" or _integer(1)(value)),
    **dict.fromkeys(("prompts", "best_metric", "reasoning_end"), _is_text),
    **dict.fromkeys(("metrics", "stop_strings"), _are_texts),
    "rows": _are_rows,
    "verify": lambda value: value == "first" or _is_boolean(value),
    "reasoning": _one_of("keep", "strip"),
    "reference": _one_of("trained", "ground_truth"),
    "min_p": _number(lambda x: 0 <= x <= 1),
    "max_round_time_s": _number(lambda x: x >= 0),
    "params_key": lambda value: _is_text(value) and value,
    "dtype": _one_of("auto", "float32", "bfloat16", "float16"),
    "backend": _one_of("auto", "hf", "fast"),
    "gather": _one_of("auto", "copy", "sharded"),
    "overlap": _is_boolean,
    "turn": _one_of("last", "first", "all"),
    "prompts_mode": _one_of("replace", "append"),
    "best_mode": _one_of("max", "min"),
    "strategies": lambda value: all(_is_text(name) and isinstance(inner, dict) for name, inner in value.items()),
}


def assert_bounded(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        assert name not in BOUNDS or BOUNDS[name](value), name


def assert_usable(loaded: GenerationSettings) -> None:
    """Values keep their bounds, are accepted again as they are, and the parameters reach another rank, by JSON."""
    assert GenerationSettings(**vars(loaded)) == loaded
    assert_bounded({name: value for name, value in vars(loaded).items() if name != "extra"})
    assert_bounded(loaded.extra)
    for query in make_queries([Prompt(0, [1], "", None)], loaded):
        assert_travels(query.params)


def assert_travels(params: Mapping[str, Any]) -> None:
    requests = [Request([1], (0, 0), params)]
    assert unpack(json.loads(json.dumps(pack(requests), allow_nan=False))) == requests


# transformers is given all parameters at once, and OmegaConf names at most the section of a key that it cannot hold.
FROM_OUTSIDE = (
    "generation: transformers refuses these parameters: ",
    "the configuration cannot be read: Incompatible key type",
    "the configuration cannot be read: generation: Incompatible key type",
)


def assert_harmless(message: str, *names: str) -> None:
    """Short lines of ASCII, each of which names one of `names`."""
    for line in message.split("\n"):
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < 700
        assert any(name in line for name in names) or line.startswith(FROM_OUTSIDE), line


def usable_or_refused(config: Mapping[Any, Any], environ: Mapping[str, str], *names: str) -> None:
    """Of a whole configuration, checked as at the start of a run. Settings are usable beside mistakes too."""
    mistakes = Mistakes()
    loaded = load_settings(real(config), environ, mistakes=mistakes)
    check_names(config, loaded, mistakes)
    if mistakes.lines:
        assert_harmless("\n".join(mistakes.lines), *names)
        assert_bounded({name: value for name, value in vars(loaded).items() if name not in ("extra", "backend")})
    else:
        assert_usable(loaded)


def test_the_bounds_are_of_every_key():
    assert BOUNDS.keys() == CHECKED


@PROFILE
@given(key=st.sampled_from(sorted(SETTINGS)) | NAMES.map("generation.{}".format), value=VALUES)
@example("generation.top_k", Awkward.HOSTILE)
@example("generation.top_k", Awkward.UNPRINTABLE)
@example("generation.top_k", Awkward.HUGE)
@example("generation.top_k", ["${}"])
@example("generation.metrics", ["x" * 300 + ".py:f"])
@example("generation.metrics", ["\ud800.py:f"])
@example("generation.eos_token_id", {1: 2})
@example("generation.eos_token_id", {"a": 1, None: 2})
@example("generation.eos_token_id", Awkward.HUGE)
def test_any_value_under_any_name_is_usable_or_refused_by_it(key, value):
    section, _, name = key.partition(".")
    usable_or_refused({"generation": {}} | {section: {name: value}}, {}, key if key in SETTINGS else "generation.")


@pytest.mark.parametrize("key", sorted(SETTINGS))
def test_numbers_at_every_bound_are_usable_or_refused(key):
    """All of them: examples that are drawn seldom fall on a bound."""
    section, _, name = key.partition(".")
    for value in (-1, -0.0, 0, 0.0, 1e-9, 0.5, 1, 1.0, 1.5, 15, 16, 2**63 - 1, 2**63, 1e308, math.nan, math.inf):
        usable_or_refused({"generation": {}} | {section: {name: value}}, {}, key)


@PROFILE
@given(generation=VALUES, trainer=VALUES)
def test_any_sections_are_usable_or_refused(generation, trainer):
    names = "generation", "trainer", "the configuration"
    usable_or_refused({"generation": generation, "trainer": trainer}, {}, *names)


@PROFILE
@given(name=st.sampled_from(["hot"]) | ANY_TEXT, params=st.dictionaries(NAMES, VALUES, max_size=3) | VALUES)
@example("hot", {"temperature": Awkward.HOSTILE})
def test_any_strategy_is_usable_or_refused(name, params):
    usable_or_refused({"generation": {"strategies": {name: params}}}, {}, "generation.strategies")


# An environment holds no NUL, and what is no UTF-8 as the surrogates that stand for bytes.
ENVIRONMENT_TEXT = st.text(st.characters(exclude_categories=(), exclude_characters="\x00"), max_size=30)


@PROFILE
@given(
    variable=st.sampled_from(VARIABLES),
    text=ENVIRONMENT_TEXT | NASTY_TEXTS | st.integers().map(str) | st.floats().map(str),
)
def test_any_text_in_a_variable_is_usable_or_refused_by_its_name(variable, text):
    usable_or_refused({"generation": {}}, {variable: text}, variable)


@PROFILE
@given(
    name=st.sampled_from(["VERL_", "VERL_GENERATION_", "VERL_MAX_VAL_", "VERL_GENERATION_TOP_K"]), end=ENVIRONMENT_TEXT
)
@example("VERL_GENERATION_", "X" * 100_000)
def test_any_name_of_a_variable_is_known_or_refused(name, end):
    usable_or_refused({}, {name + end: "1"}, "VERL_")


@PROFILE
@given(params=st.dictionaries(NAMES, VALUES, max_size=3))
@example({"bad_words_ids": Awkward.DEEP})
def test_any_override_is_usable_or_refused(params):
    try:
        changed = GLOBAL.overridden(real(params), "here")
    except ConfigError as error:
        assert_harmless(str(error), "here")
    else:
        assert_usable(changed)


JSON_TEXTS = st.dictionaries(NAMES, SCALARS, max_size=3).map(
    lambda value: json.dumps(value, default=str, skipkeys=True)
)


@PROFILE
@given(own=VALUES | st.dictionaries(NAMES, VALUES, max_size=3) | JSON_TEXTS)
@example(own="[" * 100_000)
@example(own={"suppress_tokens": Awkward.DEEP})
@example(own={"eos_token_id": {"a": 1, None: 2}})
@example(own={"\x1b[31m": 1})
def test_any_parameters_of_a_row_are_used_or_warned_of(own, caplog):
    caplog.clear()
    (query,) = make_queries([Prompt(7, [1], "", None, RowData(params=real(own)))], GLOBAL)
    assert_bounded(query.params)
    assert_travels(query.params)
    if caplog.messages:
        (message,) = caplog.messages
        assert message.startswith("row 7: ")
        assert message.isprintable()
        assert len(message) < 700
        assert query.params == GLOBAL.parameters
