"""What vLLM cannot do of Hugging Face's generation parameters. Pure; imports none of vLLM, torch and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_valgen.settings.generation_config import SAMPLING_ONLY

SERVED = frozenset({
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens"),
    *("stop_strings", "bad_words_ids", "eos_token_id"),
})  # fmt: skip
"""The parameters that vLLM has, or that `parameters.py` and `answering.py` make up for."""

NEUTRAL: Mapping[str, Any] = {
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_beams": 1, "early_stopping": False,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0, "diversity_penalty": 0.0, "renormalize_logits": False, "use_cache": True,
    "remove_invalid_values": False, "num_beam_groups": 1,
}  # fmt: skip
"""The values with which parameters that vLLM lacks change nothing, besides none and empty ones."""

_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 0.01, 2.0
"""vLLM raises a lower temperature to 0.01 and says so in its log alone; a higher one is an error when it is asked."""
_LEAST_MIN_P = 1e-5
"""vLLM takes less for none."""


def refusals(params: Mapping[str, Any]) -> list[str]:
    """Says what vLLM cannot do of a strategy's parameters, one line each; empty where it can do all.

    Args:
        params: `transformers.GenerationConfig` fields, checked, as a `Request` has them.
    """
    read = {name: value for name, value in params.items() if params.get("do_sample") or name not in SAMPLING_ONLY}
    return [line for name, value in read.items() if (line := _refusal(name, value))]


def _refusal(name: str, value: Any) -> str:
    if value is None or value in ([], {}, ()) or value == NEUTRAL.get(name, _NOTHING):
        return ""
    if name == "num_beams":
        return "beams: generation.backend=vllm has none; use fast or hf"
    if name not in SERVED:
        return f"{name}: generation.backend=vllm has no such parameter; use fast or hf"
    if name == "temperature" and not _LEAST_TEMPERATURE <= value <= _MOST_TEMPERATURE:
        taken = f"{_LEAST_TEMPERATURE:g} to {_MOST_TEMPERATURE:g}"
        return f"temperature: generation.backend=vllm takes {taken}, got {value}; use fast or hf"
    if name == "min_p" and 0 < value < _LEAST_MIN_P:
        return f"min_p: generation.backend=vllm takes 0 or at least {_LEAST_MIN_P:g}, got {value}; use fast or hf"
    return ""


_NOTHING = object()
