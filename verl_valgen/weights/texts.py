"""One forward pass of a model over texts, without a cache, whoever gathers its layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def last_logits(
    call: Callable[..., Any],
    forward: Callable[..., Any],
    texts: Sequence[Sequence[int]],
    nums_last: Sequence[int],
    device: torch.device,
    *,
    gives_positions: bool = False,
) -> list[Tensor]:
    """Logits at the last positions of texts, all of them in one batch.

    Shorter texts are padded on the right, where no position of a causal model looks: what it gives there is left out.
    So the mask need hide nothing. One that does has attention unpad in each layer, which waits for the device, or build
    a plan for each new shape. The padding repeats a token of the text: another's embedding may have NaN, which would
    reach back, as NaN has weight where it is hidden, too.

    Args:
        call: Calls the model.
        forward: What it calls: where that can leave positions out, only those asked for get logits.
        texts: Token ids.
        nums_last: N of each text, the number of positions that are asked for, at most its length.
        gives_positions: Whether the model is told that each text begins at position 0, or finds that by itself.

    Returns:
        For each text (N, V), in the dtype that the model gives, perhaps a part of a larger tensor.
    """
    lengths = [len(ids) for ids in texts]
    longest = max(lengths)
    padded = [[*ids, *ids[-1:] * (longest - len(ids))] for ids in texts]
    input_ids = torch.tensor(padded, device=device)  # (B, L)
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "use_cache": False,
    }
    if gives_positions:
        inputs["position_ids"] = torch.arange(longest, device=device).expand(len(texts), -1)
    begins = [length - num for length, num in zip(lengths, nums_last, strict=True)]
    kept = list(range(longest))
    if "logits_to_keep" in inspect.signature(forward).parameters:
        kept = sorted({i for begin, length in zip(begins, lengths, strict=True) for i in range(begin, length)})
        is_end = kept[0] == longest - len(kept)
        inputs["logits_to_keep"] = len(kept) if is_end else torch.tensor(kept, device=device)
    logits = call(**inputs).logits  # (B, K, V)
    if logits.shape[1] != len(kept):  # a model that leaves none out all the same
        kept = list(range(longest))
    places = [kept.index(begin) for begin in begins]
    return [row[place : place + num] for row, place, num in zip(logits, places, nums_last, strict=True)]
