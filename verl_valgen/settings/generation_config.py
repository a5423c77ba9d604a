"""The fields of `transformers.GenerationConfig` that may be set, and the ones that are taken from a model's own.

This module knows transformers, and imports it only when it is asked. It does not know where a value comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

from verl_valgen.settings import checks
from verl_valgen.settings.checks import Check, ConfigError, plain, quoted

SAMPLING_ONLY = frozenset(
    ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
)

WHOLE_NUMBERS = frozenset({
    "max_new_tokens", "min_new_tokens", "top_k", "num_beams", "best_of", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "prefill_chunk_size", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id",
})  # fmt: skip
"""The parameters that are counts or ids; `best_of` is ours."""

_RUNS_CODE = "it would load or run code from outside this run"
_NO_BATCHES = "assisted decoding cannot answer prompts in batches"
_ON_THE_HUB = "it belongs to a generation mode whose code transformers loads from the hub"
_TEXT_ONLY = "only the generated text is kept"

REFUSED = {
    "max_length": "it counts the prompt too; set generation.max_new_tokens",
    "min_length": "it counts the prompt too; set generation.min_new_tokens",
    "token_healing": "it changes the prompt, which is shown as it is",
    "num_return_sequences": "set generation.n",
    **dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id"), "it is the model's own that is used"),
    "compile_config": "it is the backend that decides about compilation",
    "generation_kwargs": "parameters are given flat, as generation.<name>",
    **dict.fromkeys(("custom_generate", "trust_remote_code", "assistant_model", "assistant_tokenizer"), _RUNS_CODE),
    **dict.fromkeys(("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer"), _RUNS_CODE),
    **dict.fromkeys(("is_assistant", "assistant_early_exit", "assistant_confidence_threshold"), _NO_BATCHES),
    **dict.fromkeys(("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_lookbehind"), _NO_BATCHES),
    **dict.fromkeys(("target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size"), _NO_BATCHES),
    **dict.fromkeys(("penalty_alpha", "low_memory", "dola_layers", "num_beam_groups"), _ON_THE_HUB),
    **dict.fromkeys(("diversity_penalty", "constraints", "force_words_ids"), _ON_THE_HUB),
    **dict.fromkeys(("return_dict_in_generate", "return_legacy_cache", "output_attentions"), _TEXT_ONLY),
    **dict.fromkeys(("output_hidden_states", "output_scores", "output_logits"), _TEXT_ONLY),
}
"""Why each of these is refused, by name and whatever the value."""


_TOKEN_IDS = (
    *("eos_token_id", "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "sequence_bias"),
    *("suppress_tokens", "begin_suppress_tokens"),
)
"""The parameters that name tokens."""

_CUTOFF = checks.number("a number in [0, 1) (0 switches it off)", lambda x: 0 <= x < 1)

CHECKS: Mapping[str, Check] = {
    "min_p": checks.number("a number in [0, 1]", lambda x: 0 <= x <= 1),
    "typical_p": checks.share(),
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "repetition_penalty": checks.number("a number > 0", lambda x: x > 0),
    "length_penalty": checks.number("a number", lambda _: True),
    "no_repeat_ngram_size": checks.at_least(0, "0 switches it off"),
    "min_new_tokens": checks.at_least(0),
    "num_beams": checks.at_least(1),
    "max_time": checks.number("a number of seconds > 0", lambda x: x > 0),
    "top_h": checks.share(),
    "guidance_scale": checks.number("a number", lambda _: True),
    "stop_strings": checks.texts(),
    "use_cache": checks.boolean(),
    "renormalize_logits": checks.boolean(),
    "remove_invalid_values": checks.boolean(),
}
"""Fields that have no default of ours and that transformers checks only while it generates, if at all."""


def field_names() -> frozenset[str]:
    """The fields of the installed transformers' `GenerationConfig` that may be set."""
    from transformers import GenerationConfig

    public = (name for name in vars(GenerationConfig()) if not name.startswith("_"))
    return frozenset(public) - REFUSED.keys() - {"transformers_version"}


def check(parameters: Mapping[str, Any], source: str = "generation") -> None:
    """Raises `ConfigError` where transformers would refuse these parameters, or cannot decode with them here.

    Args:
        source: Where they come from, for the error.
    """
    from transformers import GenerationConfig
    from transformers.generation import utils

    check_token_ids(parameters, None, source)
    try:
        hf_config = GenerationConfig(**parameters)  # validates
        mode = hf_config.get_generation_mode()
    except Exception as error:  # transformers compares values of any type: not only its own ValueError comes out of it
        raise ConfigError(f"{source}: transformers refuses these parameters: {plain(str(error), 300)}") from error

    if mode.value == "beam_sample":
        raise ConfigError(
            f"{source}.num_beams must be 1 with do_sample=true, got {hf_config.num_beams}: "
            "beam sampling draws from torch's global random state (set do_sample=false for beam search)"
        )
    if mode.value == "beam_search" and hf_config.stop_strings:
        raise ConfigError(f"{source}.stop_strings cannot be combined with num_beams > 1")
    # transformers moves modes that it drops to the hub (4.56 did with four); before, it had no such mapping.
    home = getattr(utils, "GENERATION_MODES_MAPPING", {}).get(mode, "")
    if "/" in home:
        raise ConfigError(f"{source}: these parameters select {plain(mode.value)}, but {_ON_THE_HUB} ({plain(home)})")


def check_token_ids(parameters: Mapping[str, Any], vocab_size: int | None, source: str = "generation") -> None:
    """Raises `ConfigError` where a parameter names a token that the model does not have: on CUDA that would end the
    process.

    Args:
        vocab_size: None where it is not known yet.
    """
    for name in _TOKEN_IDS:
        for token_id in _token_ids(parameters.get(name), name):
            is_one = isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0
            if not is_one or (vocab_size is not None and token_id >= vocab_size):
                allowed = "ids of tokens" if vocab_size is None else f"ids of tokens, below {vocab_size}"
                raise ConfigError(f"{source}.{name} must have {allowed}, got {quoted(token_id)}")


def _token_ids(value: Any, name: str) -> Iterator[Any]:
    """The leaves of a value; in `sequence_bias` the sequences alone."""
    if name == "sequence_bias" and isinstance(value, list):
        value = [pair[0] for pair in value if isinstance(pair, list) and pair]
    if isinstance(value, list):
        for item in value:
            yield from _token_ids(item, "")
    elif value is not None and name != "sequence_bias":
        yield value


def special_tokens(
    model_config: GenerationConfig | None, tokenizer: Any, more_ends: Iterable[int] = ()
) -> GenerationConfig:
    """A generation config with the special token ids of the model's own, else of the tokenizer, and nothing else.

    Where there is no padding token the end-of-sequence token serves: padding is hidden by the attention mask.

    Args:
        more_ends: Tokens that end a sequence, too, behind those that are known.
    """
    from transformers import GenerationConfig

    own = model_config or GenerationConfig()
    ids = {}
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = getattr(own, name)
        ids[name] = getattr(tokenizer, name) if value is None else value
    if ids["pad_token_id"] is None:
        eos = ids["eos_token_id"]
        ids["pad_token_id"] = eos[0] if isinstance(eos, list) else eos if eos is not None else 0
    if more := [token_id for token_id in more_ends if token_id not in as_ids(ids["eos_token_id"])]:
        ids["eos_token_id"] = [*as_ids(ids["eos_token_id"]), *more]
    return GenerationConfig(**ids)


def as_ids(value: int | list[int] | None) -> list[int]:
    """A token id, several or none, as transformers writes them, as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
