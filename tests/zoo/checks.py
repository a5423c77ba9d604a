"""The checks of one architecture: its copies, and every way of answering, against the model's own forward pass.

`examine` has the cells of its row in the table of docs/models.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from zoo.judging import read, relative_gap
from zoo.patients import SAME, SEED, Patient, describe
from zoo.upstream import UPSTREAM

from verl_valgen.backends.base import Limits
from verl_valgen.backends.fast.backend import FastBackend
from verl_valgen.backends.fast.fused import fuse
from verl_valgen.backends.hf import HFBackend
from verl_valgen.records import Request

WAYS = ("fused", "fast", "batch", "hf")
"""Checks of ways to answer, the fastest first."""


class Cell(NamedTuple):
    """The outcome of one check."""

    outcome: str
    """"right", "falls back", "wrong", "raises", or "upstream" where transformers itself is wrong or raises."""
    detail: str = ""


def examine(name: str) -> dict[str, Any]:
    """Runs all checks of an animal of the zoo.

    Returns:
        As JSON: `model`, the name of its class; `upstream`, what is wrong with transformers' own model, by
        "forward", "generate" and "reload"; `cells`, check -> outcome and detail; `cpu_s`, what it took.

    Raises:
        Exception: The model cannot be built.
    """
    start = time.process_time()
    patient = Patient(name)
    upstream = {what: fault for what, find in UPSTREAM.items() if (fault := find(patient))}
    cells = {}
    for check, (run, depends_on) in CHECKS.items():
        try:
            cell = run(patient)
        except Exception as e:
            cell = Cell("raises", describe(e))
        fault = next((what for what in depends_on if what in upstream), None)
        # A copy that differs is wrong, whatever its forward pass does.
        if fault is not None and (cell.outcome == "raises" or (cell.outcome == "wrong" and check != "copy")):
            cell = Cell("upstream", f"its own {fault}: {upstream[fault]}")
        cells[check] = cell
        patient.passes[check] = cell.outcome in ("right", "falls back")
    return {
        "model": type(patient.source).__name__,
        "attention": patient.source.config._attn_implementation,
        "upstream": upstream,
        "cells": cells,
        "distinct": patient.distinct,
        "cpu_s": round(time.process_time() - start, 1),
    }


def check_copy(patient: Patient) -> Cell:
    """The float32 copy has the source's tensors and gives its logits."""
    model = patient.copy()
    expected, actual = patient.source.state_dict(), model.state_dict()
    for name, tensor in expected.items() if patient.adapter is None else ():  # what is merged has other names
        if name not in actual or not torch.equal(tensor, actual[name]):
            return Cell("wrong", f"`{name}` differs")
    return same_logits(patient, model, patient.source)


def check_bfloat16(patient: Patient) -> Cell:
    """The bfloat16 copy is what `from_pretrained(dtype=torch.bfloat16)` makes of the saved model."""
    model = patient.copy(torch.bfloat16)
    if patient.adapter is None:
        loaded = patient.loaded[torch.bfloat16]
        if (attention := model.config._attn_implementation) != loaded.config._attn_implementation:
            loaded.set_attn_implementation(attention)  # another one rounds otherwise
    else:  # merged in float32, then rounded
        loaded = patient.copy()
        for parameter in loaded.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    expected, actual = loaded.state_dict(), model.state_dict()
    dtypes = [
        f"`{name}` is {actual[name].dtype}, not {tensor.dtype}".replace("torch.", "")
        for name, tensor in expected.items()
        if name in actual and actual[name].dtype != tensor.dtype
    ]
    cell = same_logits(patient, model, loaded)
    return Cell("wrong", "; ".join([*dtypes[:1], *([cell.detail] if cell.detail else [])])) if dtypes else cell


def same_logits(patient: Patient, actual: PreTrainedModel, expected: PreTrainedModel) -> Cell:
    try:
        gap = max(
            relative_gap(read(actual, request.input_ids), read(expected, request.input_ids))
            for request in patient.requests
        )
    except Exception as e:
        return Cell("raises", describe(e))
    return Cell("wrong", f"logits differ, gap {gap:.2g}") if gap > SAME else Cell("right")


def check_alone(patient: Patient) -> Cell:
    """`hf`, one prompt at a time."""
    return answered(patient, HFBackend, patient.requests, together=False, way="hf")


def check_batch(patient: Patient) -> Cell:
    """`hf`, prompts of unequal lengths together."""
    return answered(patient, HFBackend, patient.requests, together=True, way="batch")


def check_fast(patient: Patient) -> Cell:
    """`fast`, as on CPU."""
    return answered(patient, FastBackend, patient.requests, together=True, way="fast")


def check_fused(patient: Patient) -> Cell:
    """`fast` with fused modules, as on CUDA."""
    return answered(patient, FastBackend, patient.requests, together=True, fused=True, way="fused")


def check_sampling(patient: Patient) -> Cell:
    """Seeded sampling gives what the model's logits and the noise say, alone and in a batch."""
    alone = answered(patient, FastBackend, patient.sampled, together=False)
    batch = answered(patient, FastBackend, patient.sampled, together=True)
    return batch if alone.outcome in ("right", "falls back") else alone


def check_verified(patient: Patient) -> Cell:
    """What a round would show: the answers of the fastest way to which its net has no objection, and they are right.

    The net reads two answers: one beside others, as the first here, and the longest.
    """
    for way in (way for way in WAYS if way in patient.answers):
        read_by_net = [(patient.requests[i], patient.answers[way][i]) for i in (0, -1)]
        objections = [found for pair in read_by_net if (found := patient.objection(*pair))]
        if objections and patient.passes.get(way):
            return Cell("wrong", f"objects to right answers of {way}: {objections[0]}")
        if not objections:
            return Cell("right", way) if patient.passes.get(way) else Cell("wrong", f"passes wrong answers of {way}")
    return Cell("wrong", "no way passes")


def answered(
    patient: Patient,
    backend_class: type[HFBackend],
    requests: list[Request],
    *,
    together: bool,
    fused: bool = False,
    way: str | None = None,
) -> Cell:
    """Has a backend answer, and the source judge.

    Args:
        way: One of `WAYS`, for which the answers are kept.
    """
    model = patient.copy()
    if fused:
        fuse(model)
    tokenizer: Any = None  # for stop strings alone
    backend = backend_class(model, tokenizer, SEED, Limits())
    with torch.no_grad():
        batches = [requests] if together else [[request] for request in requests]
        completions = [completion for batch in batches for completion in backend.generate(batch)]
    judgement = patient.judge(requests, completions)
    if way is not None:
        patient.answers[way] = completions
    if judgement.num_wrong:
        return Cell("wrong", str(judgement))
    reason = getattr(backend, "unsuitable", None)
    return Cell("right") if reason is None else Cell("falls back", reason)


CHECKS: dict[str, tuple[Callable[[Patient], Cell], tuple[str, ...]]] = {
    "copy": (check_copy, ("forward",)),
    "bfloat16": (check_bfloat16, ("forward", "reload")),
    "hf": (check_alone, ("forward", "generate")),
    "batch": (check_batch, ("forward", "generate")),
    "fast": (check_fast, ("forward", "generate")),
    "fused": (check_fused, ("forward", "generate")),
    "sampling": (check_sampling, ("forward", "generate")),
    "verified": (check_verified, ("forward", "generate")),
}
"""Check -> what does it, and the faults of transformers' own model that would be its own."""
