"""Measures the first link of the proof under overlap: how far right and wrong copies are from the trainer's model.

    python benchmarks/links.py                        # two processes, models and faults of verification.py
    python benchmarks/links.py --device cuda --processes 1

The trainer's model is read as in verification.py; the copy as it generates, plain and with fused modules. Gaps are
relative differences of logits (`verl_valgen.backends.comparing`). Prints the tables of docs/verification.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import logging
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from tiny_models import ARCHITECTURES, WEIGHTS, language, tiny_model
from torch import Tensor
from verification import PAIRS, copy_of, has_experts
from verification_faults import FAULTS

from verl_valgen.backends.comparing import closeness, dissimilarity, gaps
from verl_valgen.backends.fast.fused import fuse

KINDS = ("1", "3", "11", "12", "-")
TEXTS = [text[:33] for text in language(2, 48, seed=77)]


class Read(NamedTuple):
    model: str
    weights: str
    pair: str
    fault: int | None
    """Its place in `FAULTS`; None: a right copy."""
    half: float
    most: float
    objection: str | None


def examine(task: tuple[str, str]) -> list[Read]:
    """Reads right and wrong copies of one architecture."""
    name, device = task
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found: list[Read] = []
    for weights in WEIGHTS:
        model, earlier = tiny_model(name, weights)
        for pair in PAIRS:
            found += of_pair(name, weights, pair, model.to(device), earlier)
    return found


def of_pair(name: str, weights: str, pair: str, model: Any, earlier: dict[str, Tensor]) -> Iterator[Read]:
    """A right copy, plain and with fused modules, and wrong ones."""
    dtypes = PAIRS[pair]
    expected = [trainers_logits(model, text, dtypes[1]) for text in TEXTS]
    right = copy_of(model, dtypes[0])
    yield judged(name, weights, pair, None, expected, right, dtypes)
    with contextlib.suppress(Exception):  # a model that does not know our cache
        fuse(right)
        yield judged(name, weights, pair, None, expected, right, dtypes)
    for number, fault in enumerate(FAULTS):
        is_possible = weights != "random" and ("step before" not in fault.what or earlier)
        if fault.kind not in KINDS or name not in fault.models or not is_possible:
            continue
        trained = copy.deepcopy(model)
        fault.prepare(trained)
        wrong = copy_of(trained, dtypes[0])
        with torch.no_grad():
            fault.plant(wrong, earlier)
        expected = [trainers_logits(trained, text, dtypes[1]) for text in TEXTS]
        yield judged(name, weights, pair, number, expected, wrong, dtypes)


@torch.no_grad()
def trainers_logits(model: Any, text: list[int], dtype: torch.dtype) -> Tensor:
    """As FSDP's mixed precision and verl's autocast have them, (L, V)."""
    reader = copy.deepcopy(model)
    for parameter in reader.parameters():
        parameter.data = parameter.data.to(dtype)
    ids = torch.tensor([text[:-1]], device=model.device)
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        return reader(input_ids=ids, use_cache=False).logits[0]


@torch.no_grad()
def judged(
    name: str, weights: str, pair: str, fault: int | None, expected: Sequence[Tensor], read: Any, dtypes: Any
) -> Read:
    """The larger figures of both texts, as the first link judges each."""
    outcomes = []
    for text, logits in zip(TEXTS, expected, strict=True):
        ids = torch.tensor([text[:-1]], device=read.device)
        actual = read(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        in_order = gaps(logits, actual).sort().values
        objection = dissimilarity(in_order, closeness(dtypes, has_experts(name), read.device))
        number = len(in_order)
        outcomes.append((in_order[number // 2].item(), in_order[number * 9 // 10].item(), objection))
    halves, mosts, objections = zip(*outcomes, strict=True)
    return Read(name, weights, pair, fault, max(halves), max(mosts), next(filter(None, objections), None))


def show_right(found: Sequence[Read]) -> None:
    print("\n| copy / trainer | weights | copies | half of the positions, at most | one in ten, at most | alarms |")
    print("|---" * 6 + "|")
    for pair, routed, weights in itertools.product(PAIRS, (False, True), WEIGHTS):
        some = [r for r in found if (r.pair, r.weights, has_experts(r.model)) == (pair, weights, routed)]
        if some:
            kind = f"{weights}, {'with' if routed else 'without'} experts"
            figures = f"{max(r.half for r in some):.2g} | {max(r.most for r in some):.2g}"
            print(f"| {pair} | {kind} | {len(some)} | {figures} | {sum(r.objection is not None for r in some)} |")
    for r in found:
        if r.objection:
            print(f"- {r.model}, {r.weights}, {r.pair}: {r.objection}")


def show_wrong(found: Sequence[Read]) -> None:
    columns = ["kind", "fault", "model", "weights", *(f"{pair}: half, one in ten, found" for pair in PAIRS)]
    print("\n| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    by_case = {(r.fault, r.model, r.weights, r.pair): r for r in found}
    for number, model, weights in sorted({(r.fault or 0, r.model, r.weights) for r in found}):
        cells = [FAULTS[number].kind, FAULTS[number].what, model, weights]
        for pair in PAIRS:
            r = by_case[number, model, weights, pair]
            cells.append(f"{r.half:.2g}, {r.most:.2g}, {'**yes**' if r.objection else 'no'}")
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--models", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="MODEL")
    arguments = parser.parse_args()
    found: list[Read] = []
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for some in pool.imap_unordered(examine, [(name, arguments.device) for name in arguments.models]):
            found += some
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {arguments.device}")
    show_right([r for r in found if r.fault is None])
    show_wrong([r for r in found if r.fault is not None])


if __name__ == "__main__":
    main()
