"""The checks of one architecture: its copies, and every way of answering, against the model's own forward pass.

A model is built once, as `sources.py` does; it stands for the trainer's. `examine` has the cells of its row in the
table of docs/models.md.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel
from zoo.configurations import variant
from zoo.judging import Judgement, judge_all, read, relative_gap
from zoo.sources import source_model

from verl_valgen.backends.base import Limits
from verl_valgen.backends.fast.backend import FastBackend
from verl_valgen.backends.fast.fused import fuse
from verl_valgen.backends.hf import HFBackend
from verl_valgen.records import Completion, Request
from verl_valgen.weights.gather import gather

SEED = 3
GREEDY = {"do_sample": False, "max_new_tokens": 12}
SAMPLING = {"do_sample": True, "max_new_tokens": 12, "temperature": 1.0, "top_k": 20}
PROMPT_LENGTHS = (3, 12, 20, 30)
"""Below, across and above the windows, chunks and contexts of the variants, which are 8 to 16 tokens."""

SAME = 1e-3
"""How far the logits of two float32 models, or of two bfloat16 ones, may differ, in standard deviations."""


class Cell(NamedTuple):
    """The outcome of one check."""

    outcome: str
    """"right", "falls back", "wrong", "raises", or "upstream" where transformers itself is wrong or raises."""
    detail: str = ""


class Patient:
    """A model under examination."""

    distinct = 0
    """Number of different tokens in each answer of `generate`, added up: few say little."""

    def __init__(self, name: str) -> None:
        self.source = source_model(name)
        self.adapter = variant(name).adapter
        generator = torch.Generator().manual_seed(2)
        self.requests = [
            Request(torch.randint(3, 90, (length,), generator=generator).tolist(), (row, 0), GREEDY)
            for row, length in enumerate(PROMPT_LENGTHS)
        ]
        self.sampled = [replace(request, params=SAMPLING) for request in self.requests]

    def copy(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The copy that a round would answer with."""
        model = gather(self.source, dtype=dtype, device=torch.device("cpu"), keep=True)
        assert model is not None
        model.generation_config = GenerationConfig(**self.source.generation_config.to_diff_dict())
        return model

    @functools.cached_property
    def loaded(self) -> dict[torch.dtype, PreTrainedModel]:
        """What `from_pretrained` makes of the saved source, in float32 and in bfloat16."""
        with tempfile.TemporaryDirectory() as directory:
            copy.deepcopy(self.source).save_pretrained(directory)  # which writes to the configuration
            attention = self.source.config._attn_implementation
            return {
                dtype: type(self.source).from_pretrained(directory, dtype=dtype, attn_implementation=attention).eval()
                for dtype in (torch.float32, torch.bfloat16)
            }

    def judge(self, requests: Sequence[Request], completions: Sequence[Completion]) -> Judgement:
        return judge_all(self.source, requests, completions, SEED)


def examine(name: str) -> dict[str, Any]:
    """Runs all checks of an animal of the zoo.

    Returns:
        As JSON: `model`, the name of its class; `upstream`, what is wrong with transformers' own model, by
        "forward", "generate" and "reload"; `cells`, check -> outcome and detail; `seconds`.

    Raises:
        Exception: The model cannot be built.
    """
    start = time.perf_counter()
    patient = Patient(name)
    upstream = {what: fault for what, find in UPSTREAM.items() if (fault := find(patient))}
    cells = {}
    for check, (run, depends_on) in CHECKS.items():
        try:
            cell = run(patient)
        except Exception as e:
            cell = Cell("raises", describe(e))
        if cell.outcome in ("wrong", "raises"):
            for what in depends_on:
                if what in upstream:
                    cell = Cell("upstream", f"its own {what}: {upstream[what]}")
                    break
        cells[check] = cell
    return {
        "model": type(patient.source).__name__,
        "attention": patient.source.config._attn_implementation,
        "upstream": upstream,
        "cells": cells,
        "distinct": patient.distinct,
        "seconds": round(time.perf_counter() - start, 1),
    }


def describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


# What is wrong with transformers' own model.


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
    """Transformers' own `generate`, one prompt at a time, judged by the model's own forward pass."""
    completions = []
    try:
        for request in patient.requests:
            ids = torch.tensor([request.input_ids])
            model: Any = patient.source
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
            completions.append(Completion(output[0, ids.shape[1] :].tolist(), "length"))
        judgement = patient.judge(patient.requests, completions)
        patient.distinct = sum(len(set(completion.output_ids)) for completion in completions)
    except Exception as e:
        return describe(e)
    return str(judgement) if judgement.num_wrong else None


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


# The checks.


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
    return answered(patient, HFBackend, patient.requests, together=False)


def check_batch(patient: Patient) -> Cell:
    """`hf`, prompts of unequal lengths together."""
    return answered(patient, HFBackend, patient.requests, together=True)


def check_fast(patient: Patient) -> Cell:
    """`fast`, as on CPU."""
    return answered(patient, FastBackend, patient.requests, together=True)


def check_fused(patient: Patient) -> Cell:
    """`fast` with fused modules, as on CUDA."""
    return answered(patient, FastBackend, patient.requests, together=True, fused=True)


def check_sampling(patient: Patient) -> Cell:
    """Seeded sampling gives what the model's logits and the noise say, alone and in a batch."""
    alone = answered(patient, FastBackend, patient.sampled, together=False)
    batch = answered(patient, FastBackend, patient.sampled, together=True)
    return batch if alone.outcome in ("right", "falls back") else alone


def answered(
    patient: Patient, backend_class: type[HFBackend], requests: list[Request], *, together: bool, fused: bool = False
) -> Cell:
    """Has a backend answer, and the source judge."""
    model = patient.copy()
    if fused:
        fuse(model)
    tokenizer: Any = None  # for stop strings alone
    backend = backend_class(model, tokenizer, SEED, Limits())
    with torch.no_grad():
        batches = [requests] if together else [[request] for request in requests]
        completions = [completion for batch in batches for completion in backend.generate(batch)]
    judgement = patient.judge(requests, completions)
    if judgement.num_wrong:
        return Cell("wrong", str(judgement))
    reason = getattr(backend, "unsuitable", None)
    return Cell("right") if reason is None else Cell("falls back", reason)


CHECKS: dict[str, tuple[Callable[[Patient], Cell], tuple[str, ...]]] = {
    "copy": (check_copy, ()),
    "bfloat16": (check_bfloat16, ("forward", "reload")),
    "hf": (check_alone, ("forward", "generate")),
    "batch": (check_batch, ("forward", "generate")),
    "fast": (check_fast, ("forward", "generate")),
    "fused": (check_fused, ("forward", "generate")),
    "sampling": (check_sampling, ("forward", "generate")),
}
"""Check -> what does it, and the faults of transformers' own model that would be its own."""
