"""Every key that can be set, what its value may be, and its environment variable.

This module owns the list. It knows neither where a value comes from (`config.py`) nor what it does.
"""

from __future__ import annotations

from typing import NamedTuple

from verl_valgen.backends import BACKENDS
from verl_valgen.settings import checks
from verl_valgen.settings.checks import Check


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
_STRATEGIES = checks.mapping_of_mappings("(?!by_source$)[A-Za-z0-9_-]{1,64}", "letters, digits, _ and -; not by_source")

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
    "generation.n": Setting(checks.at_least(1)),
    "generation.best_of": Setting(checks.at_least(1)),
    "generation.strategies": Setting(_STRATEGIES),
    "generation.params_key": Setting(checks.text()),
    "generation.turn": Setting(checks.one_of("last", "first", "all")),
    "generation.prompts": Setting(checks.optional_text()),
    "generation.prompts_mode": Setting(checks.one_of("replace", "append")),
    "generation.before_train": Setting(checks.boolean()),
    "generation.every": Setting(checks.at_least(1)),
    "generation.metrics": Setting(checks.texts(may_be_empty=True)),
    "generation.best_metric": Setting(checks.optional_text()),
    "generation.best_mode": Setting(checks.one_of("max", "min")),
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
