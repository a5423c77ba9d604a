"""Hugging Face's generation parameters as vLLM's own. What it has none for is refused before (`refusals.py`).

Imports vLLM only where its own object is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from verl_valgen.backends.sampling import philox_4x32
from verl_valgen.settings.generation_config import as_ids

if TYPE_CHECKING:
    from vllm import SamplingParams

    from verl_valgen.records import Request


def sampling_seeds(seed: int, keys: Sequence[tuple[int, int]]) -> list[int]:
    """The seeds of answers, in [0, 2**63), from the seed of all and each answer's (row, completion).

    The counter's first word keeps them apart from the noise of the other backends, where that is 0.
    """
    rows, completions = (torch.tensor(numbers, dtype=torch.int64) for numbers in zip(*keys, strict=True))
    words = philox_4x32((1, 0, rows, completions), (seed & 0xFFFFFFFF, seed >> 32))
    return ((words[0] << 31) | (words[1] >> 1)).tolist()


def eos_ids_of(request: Request, model_eos_ids: int | list[int] | None) -> list[int]:
    """The tokens that end an answer: those that the request names, else the model's."""
    own = request.params.get("eos_token_id")
    return as_ids(model_eos_ids if own is None else own)


def sampling_params(
    request: Request, max_new_tokens: int, eos_ids: list[int], seed: int, *, logprobs: bool
) -> SamplingParams:
    """What vLLM is asked for one request.

    Tokens that end an answer go as `stop_token_ids`, so that it is we who name them; stop strings are looked for here,
    as vLLM has no tokenizer. Words may not begin in the prompt to count as bad ones: vLLM looks at new tokens only.

    Args:
        max_new_tokens: In place of the parameter of that name, as far as the context reaches; at least 1.
        seed: Of this answer, see `sampling_seeds`.
        logprobs: Whether greedy answers, too, are to come with log-probabilities: they take time.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from verl_valgen.backends.vllm.versions import set_bad_words

    params = request.params
    sampling: dict[str, Any] = {"temperature": 0.0}
    if params.get("do_sample"):
        values = {name: params.get(name) for name in ("temperature", "top_k", "top_p", "min_p")}
        sampling = {name: value for name, value in values.items() if value is not None}
        sampling["seed"] = seed
    made = SamplingParams(
        **sampling,
        repetition_penalty=params.get("repetition_penalty") or 1.0,
        max_tokens=max_new_tokens,
        min_tokens=min(params.get("min_new_tokens") or 0, max_new_tokens),
        ignore_eos=True,
        stop_token_ids=eos_ids,
        logprobs=0 if logprobs or params.get("do_sample") or request.wants_logprob else None,
        flat_logprobs=True,  # numbers alone: objects for every token have Python look through all others for garbage
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    # A word that is an end of answers is no bad one, as in transformers.
    words = [list(ids) for ids in params.get("bad_words_ids") or [] if not (len(ids) == 1 and ids[0] in eos_ids)]
    if words:
        set_bad_words(made, words)
    return made
