"""What is wrong with transformers' own models, so that nothing that reads or runs them can be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from zoo.judging import read, read_by_prefixes, relative_gap
from zoo.patients import GREEDY, SAME, Patient, describe

from verl_valgen.records import Completion

SIMILAR = 0.1
"""How far the logits with a cache may differ, in standard deviations: such as choose the same tokens most of the time,
and yet are not those of another position."""


def fault_of_forward(patient: Patient) -> str | None:
    """A model whose forward pass raises, varies, or looks ahead cannot be a judge."""
    ids = patient.requests[-1].input_ids
    try:
        whole, again, part = read(patient.source, ids), read(patient.source, ids), read(patient.source, ids[:20])
    except Exception as e:
        return describe(e)
    if not whole.isfinite().all():
        return "logits that are not finite"
    if (gap := relative_gap(again, whole)) > SAME:
        return f"two passes differ, gap {gap:.2g}"
    if (gap := relative_gap(part, whole[:20])) > SAME:
        return f"what follows changes the logits, gap {gap:.2g}"
    return None


def fault_of_generate(patient: Patient) -> str | None:
    """Transformers' own `generate`, one prompt at a time: its tokens and logits, judged by the model's own forward."""
    completions, gaps = [], []
    try:
        for request in patient.requests:
            ids = torch.tensor([request.input_ids])
            model: Any = patient.source
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True, **GREEDY
            )
            chosen = output.sequences[0, ids.shape[1] :].tolist()
            completions.append(Completion(chosen, "length"))
            said = torch.cat(output.logits).float()
            gap = relative_gap(said, read(patient.source, [*request.input_ids, *chosen])[-len(chosen) - 1 : -1])
            if gap > SIMILAR:  # see `judge_all`
                gap = min(gap, relative_gap(said, read_by_prefixes(patient.source, request.input_ids, chosen)))
            gaps.append(gap)
        judgement = patient.judge(patient.requests, completions)
        patient.distinct = sum(len(set(completion.output_ids)) for completion in completions)
    except Exception as e:
        return describe(e)
    if judgement.num_wrong:
        return str(judgement)
    return f"other logits, gap {max(gaps):.2g}" if max(gaps) > SIMILAR else None


def fault_of_reload(patient: Patient) -> str | None:
    """`save_pretrained` and `from_pretrained`, in the same dtype and in bfloat16."""
    if patient.adapter is not None:
        return None
    ids = patient.requests[-1].input_ids
    try:
        gap = relative_gap(read(patient.loaded[torch.float32], ids), read(patient.source, ids))
        read(patient.loaded[torch.bfloat16], ids)
    except Exception as e:
        return describe(e)
    return f"other logits, gap {gap:.2g}" if gap > SAME else None


UPSTREAM: dict[str, Callable[[Patient], str | None]] = {
    "forward": fault_of_forward,
    "generate": fault_of_generate,
    "reload": fault_of_reload,
}
"""Short name -> what looks for a fault, and returns None where there is none."""
