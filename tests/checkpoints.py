"""Reads the sharded checkpoints of verl's FSDP trainers, and makes plain models of them.

Written without the package's own gather, to judge it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from verl_valgen.prompts.tokens import Decoder


def read_sharded(directory: Path) -> dict[str, Tensor]:
    """The whole parameters of `global_step_<N>/`, in the dtype in which they are trained."""
    shards = [torch.load(path, weights_only=False) for path in sorted(directory.glob("model_world_size_*_rank_*.pt"))]
    return {name: _whole([shard[name] for shard in shards]) for name in shards[0]}


def _whole(parts: list[Any]) -> Tensor:
    if isinstance(parts[0], DTensor):
        (placement,) = parts[0].placements
        return torch.cat([part.to_local() for part in parts], dim=placement.dim)
    if hasattr(parts[0], "local_shards"):
        return torch.cat([shard.tensor for part in parts for shard in part.local_shards()])
    return parts[0]


def plain_model(checkpoint: Path, model_directory: Path, lora: dict[str, Any] | None = None) -> PreTrainedModel:
    """The checkpoint as a plain float32 model; adapters are merged by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**lora))
    missing = model.load_state_dict(read_sharded(checkpoint), strict=False)
    assert not missing.missing_keys, missing
    assert not missing.unexpected_keys, missing
    return (model.merge_and_unload() if lora is not None else model).eval()


def plain_greedy(model: PreTrainedModel, input_ids: list[int], max_new_tokens: int, **parameters: Any) -> list[int]:
    """New tokens of Hugging Face's greedy search on one unpadded prompt; further parameters are for `generate`."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([input_ids]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            **parameters,
        )
    return output[0, len(input_ids) :].tolist()


def assert_greedy_samples(
    samples: Sequence[dict[str, Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    **parameters: Any,
) -> None:
    """The recorded samples are the model's greedy answers to their prompts; see `plain_greedy`."""
    for sample in samples:
        prompt_ids = tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]
        stopping = {"tokenizer": tokenizer} if "stop_strings" in parameters else {}
        output_ids = plain_greedy(model, prompt_ids, max_new_tokens, **parameters, **stopping)
        assert sample["generation"] == Decoder(tokenizer).answer(output_ids)
        assert sample["num_new_tokens"] == len(output_ids)


def assert_nearly_greedy_samples(
    samples: Sequence[dict[str, Any]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The recorded samples are greedy answers of the trainer's model, which computes in bfloat16.

    So its choice is the best one of float32, or next to it.
    """
    num_checked = 0
    for sample in samples:
        assert sample["params"]["dtype"] == "bfloat16"
        prompt_ids = tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]
        output_ids = tokenizer(sample["generation"], add_special_tokens=False)["input_ids"]
        assert output_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + output_ids])).logits[0, len(prompt_ids) - 1 : -1]  # (T, V)
        gaps = (logits.max(-1).values - logits.gather(1, torch.tensor(output_ids)[:, None])[:, 0]).tolist()
        # Up to a special token, which the text does not show: from there on its tokens are not those that were chosen.
        shown = next((i for i, best in enumerate(logits.argmax(-1)) if int(best) in tokenizer.all_special_ids), None)
        assert max(gaps[:shown], default=0.0) < 0.1
        num_checked += len(gaps[:shown])
    assert num_checked >= 5
