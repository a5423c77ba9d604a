"""Measures the rule by which answers are proved: false alarms on right answers, and what is found of wrong ones.

    python benchmarks/verification.py                              # two processes, answers of each pair of dtypes: 3400
    python benchmarks/verification.py --device cuda --processes 1  # `fast` through captured graphs

Answers come from Hugging Face's loop and from `fast`, plain and with fused modules, in padded batches. The reader is
the model as the trainer computes it: float32, or weights rounded to bfloat16 under autocast; teacher-forced, one answer
at a time, without cache and padding. Prints the tables of docs/verification.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import logging
import multiprocessing
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
import transformers
from tiny_models import ARCHITECTURES, EOS, WEIGHTS, language, special_ids, tiny_model
from torch import Tensor
from transformers import LogitsProcessorList
from verification_faults import ALWAYS_WRONG, FAULTS

from verl_valgen.backends import judging
from verl_valgen.backends.base import Limits
from verl_valgen.backends.fast.backend import FastBackend
from verl_valgen.backends.fast.fused import fuse
from verl_valgen.backends.hf import HFBackend
from verl_valgen.backends.padding import left_pad
from verl_valgen.backends.sampling import GumbelNoise, logits_warpers
from verl_valgen.records import Request

SEED = 7
PAIRS = {
    "bfloat16 / bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 / bfloat16": (torch.float32, torch.bfloat16),
    "float32 / float32": (torch.float32, torch.float32),
}
"""Dtypes of answer and reader."""
_SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
GREEDY = {"do_sample": False}
DEFAULT = _SAMPLED | {"top_k": 50, "top_p": 0.7}
PARAMS = (
    GREEDY, DEFAULT, GREEDY, DEFAULT, DEFAULT | {"temperature": 0.3}, DEFAULT | {"temperature": 1.5},
    GREEDY, DEFAULT, _SAMPLED | {"top_p": 0.95}, _SAMPLED | {"min_p": 0.1}, _SAMPLED | {"top_k": 3},
    _SAMPLED | {"top_k": 1},
)  # fmt: skip
"""In turn, one for each batch."""
LENGTHS = (24, 24, 24, 8, 24, 1, 48, 2)
"""New tokens, in turn as well."""
PROMPT_TOKENS = (3, 5, 9, 14, 20, 33, 50)
LONG, NUM_LONG = 400, 2
BATCH, ROUND = 16, 8
"""Right answers at once; wrong ones at once, of which a round reads two."""
NUM_WRONG = {"bfloat16 / bfloat16": 48, "float32 / float32": 16}
"""Wrong answers for each fault, model and kind of weights; half of them greedy."""


class Right(NamedTuple):
    model: str
    weights: str
    pair: str
    shortfalls: list[float]
    objection: str | None


class Wrong(NamedTuple):
    fault: int
    """Its place in `FAULTS`."""
    model: str
    weights: str
    pair: str
    is_greedy: bool
    number: int
    """Answers with one number come from one round."""
    is_read: bool
    """Whether the round would read it."""
    differs: bool
    """From what a right copy answers."""
    shortfalls: list[float]
    objection: str | None


def examine(task: tuple[str, argparse.Namespace]) -> list[Right | Wrong]:
    """Makes all answers of one architecture."""
    name, arguments = task
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    records: list[Right | Wrong] = []
    sound = [other for other in ARCHITECTURES if other not in ALWAYS_WRONG]
    for weights in WEIGHTS:
        model, earlier = tiny_model(name, weights)
        model = model.to(arguments.device)
        if name not in ALWAYS_WRONG:
            num_answers = -(-arguments.answers // (len(sound) * len(WEIGHTS)))
            for pair in PAIRS:
                records += right_answers(name, weights, model, pair, num_answers)
        if weights != "random" and arguments.faults:
            for number, fault in enumerate(FAULTS):
                if name in fault.models:
                    for pair in NUM_WRONG:
                        records += wrong_answers(number, name, weights, model, earlier, pair)
    return records


def right_answers(name: str, weights: str, model: Any, pair: str, num_answers: int) -> Iterator[Right]:
    answer_dtype, reader_dtype = PAIRS[pair]
    judge = judge_of(model, answer_dtype, reader_dtype)
    ways = list(ways_of(model, answer_dtype))
    # So that the few batches of each do not all have the same parameters.
    offset = list(ARCHITECTURES).index(name) + 2 * WEIGHTS.index(weights) + 5 * list(PAIRS).index(pair)
    batches = [
        (PARAMS[i % len(PARAMS)], LENGTHS[i % len(LENGTHS)], min(BATCH, num_answers - (i - offset) * BATCH))
        for i in range(offset, offset - (-num_answers // BATCH))
    ]
    if weights == "trained" and pair == "bfloat16 / bfloat16":
        batches.append((DEFAULT, LONG, NUM_LONG))
    for i, (params, length, size) in enumerate(batches):
        requests = some_requests(size, params, length, seed=100 * offset + i)
        for request, output_ids in zip(requests, ways[i % len(ways)](requests), strict=True):
            yield Right(name, weights, pair, *judge(request, output_ids))


def wrong_answers(
    number: int, name: str, weights: str, model: Any, earlier: dict[str, Tensor], pair: str
) -> Iterator[Wrong]:
    fault = FAULTS[number]
    if "step before" in fault.what and not earlier:
        return
    answer_dtype, reader_dtype = PAIRS[pair]
    model = copy.deepcopy(model)
    fault.prepare(model)
    judge = judge_of(model, answer_dtype, reader_dtype)
    right, wrong = copy_of(model, answer_dtype), copy_of(model, answer_dtype)
    fault.plant(wrong, earlier)
    size = 1 if name in ALWAYS_WRONG else ROUND
    for params in (GREEDY, DEFAULT):
        requests = some_requests(NUM_WRONG[pair] // 2, params, 24, seed=1)
        expected = [ids for i in range(0, len(requests), size) for ids in answers(right, requests[i : i + size])]
        for begin in range(0, len(requests), ROUND):
            batch = requests[begin : begin + ROUND]
            with fault.around(wrong):
                found = answers(wrong, batch)
            lengths = [len(request.input_ids) for request in batch]
            totals = [length + len(output_ids) for length, output_ids in zip(lengths, found, strict=True)]
            read = {lengths.index(min(lengths)), totals.index(max(totals))}
            for i, (request, output_ids) in enumerate(zip(batch, found, strict=True)):
                differs = output_ids != expected[begin + i]
                judged = judge(request, output_ids)
                yield Wrong(number, name, weights, pair, params is GREEDY, begin, i in read, differs, *judged)


def copy_of(model: Any, dtype: torch.dtype) -> Any:
    """What `from_pretrained(dtype=...)` makes of a model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        attention = model.config._attn_implementation
        result = type(model).from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    result.generation_config = special_ids()
    return result.eval().requires_grad_(False).to(model.device)


def ways_of(model: Any, dtype: torch.dtype) -> Iterator[Callable[[Sequence[Request]], list[list[int]]]]:
    """The ways that give right answers: both backends (on CUDA `fast` fuses and captures graphs), and fused modules."""
    for backend in (HFBackend, FastBackend):
        generate = backend(copy_of(model, dtype), None, SEED, Limits(batch_size=BATCH)).generate
        yield lambda requests, generate=generate: [completion.output_ids for completion in generate(requests)]
    exact, fused = copy_of(model, torch.float32), copy_of(model, dtype)
    ids = torch.tensor(language(1, 30, seed=2), device=model.device)
    with contextlib.suppress(Exception), torch.no_grad():  # they may not fit
        expected = exact(input_ids=ids, use_cache=False).logits
        fuse(exact)
        if torch.allclose(exact(input_ids=ids, use_cache=False).logits, expected, atol=1e-3 * expected.std().item()):
            fuse(fused)
            yield lambda requests: answers(fused, requests)


def answers(model: Any, requests: Sequence[Request]) -> list[list[int]]:
    """What transformers' own loop answers in one padded batch, without the care that a backend takes."""
    input_ids, mask = left_pad([request.input_ids for request in requests], model.device)
    params, (num_prompts, prompt_length) = requests[0].params, input_ids.shape
    processors = LogitsProcessorList()
    if params["do_sample"]:
        keys = [request.key for request in requests]
        processors += logits_warpers(params, model.device)
        processors.append(GumbelNoise(SEED, keys, prompt_length, params["max_new_tokens"], model.device))
    config = copy.deepcopy(special_ids())
    config.update(do_sample=False, max_new_tokens=params["max_new_tokens"])
    found = model.generate(
        input_ids, attention_mask=mask, generation_config=config, logits_processor=processors, synced_gpus=False
    )
    rows = found[:, prompt_length:].tolist()
    assert len(rows) == num_prompts
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def judge_of(
    model: Any, answer_dtype: torch.dtype, dtype: torch.dtype
) -> Callable[[Request, list[int]], tuple[list[float], str | None]]:
    """The trainer's model as a reader: FSDP's mixed precision casts parameters and leaves buffers, verl autocasts."""
    reader = copy.deepcopy(model)
    for parameter in reader.parameters():
        parameter.data = parameter.data.to(dtype)
    has_experts = any("experts" in name for name, _ in reader.named_modules())
    tolerance = judging.tolerance((answer_dtype, dtype), has_experts)

    @torch.no_grad()
    def judge(request: Request, output_ids: list[int]) -> tuple[list[float], str | None]:
        ids = torch.tensor([request.input_ids + output_ids[:-1]], device=model.device)
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            logits = reader(input_ids=ids, use_cache=False).logits[0, -len(output_ids) :]
        found = judging.shortfalls(logits, request, output_ids, SEED, LogitsProcessorList()).cpu()
        return found.tolist(), judging.objection(found, tolerance)

    return judge


def some_requests(number: int, params: dict[str, Any], max_new_tokens: int, seed: int) -> list[Request]:
    lengths = random.Random(seed).choices(PROMPT_TOKENS, k=number)
    texts = language(number, max(PROMPT_TOKENS), seed=1000 + seed)
    return [
        Request(text[:length], (1000 * seed + i, 0), params | {"max_new_tokens": max_new_tokens})
        for i, (text, length) in enumerate(zip(texts, lengths, strict=True))
    ]


def show_right(records: Sequence[Right]) -> None:
    print(
        "\n| answer / reader | weights | answers | tokens | not the first choice | 99 % | 99.9 % | largest | alarms |"
    )
    print("|---" * 9 + "|")
    names = {"without experts": False, "with experts": True}
    for pair, (group, routed), weights in itertools.product(PAIRS, names.items(), WEIGHTS):
        some = [r for r in records if (r.pair, r.weights) == (pair, weights) and has_experts(r.model) == routed]
        if not some:
            continue
        values = torch.tensor([value for r in some for value in r.shortfalls])
        quantiles = [f"{torch.quantile(values, q):.3f}" for q in (0.99, 0.999)]
        share, alarms = float((values > 0).double().mean()), sum(r.objection is not None for r in some)
        cells = [pair, f"{weights}, {group}", len(some), len(values), f"{share:.2%}", *quantiles]
        print("| " + " | ".join(str(cell) for cell in [*cells, f"{values.max():.2f}", alarms]) + " |")
    num_models = len({r.model for r in records})
    alarms = sum(r.objection is not None for r in records)
    longest = max(len(r.shortfalls) for r in records)
    print(f"\n{len(records)} right answers of {num_models} models, up to {longest} tokens long: {alarms} alarms.")
    for record in records:
        if record.objection:
            print(f"- {record.model}, {record.weights}, {record.pair}: {record.objection}")


def has_experts(name: str) -> bool:
    return "num_experts" in ARCHITECTURES[name]


def show_wrong(records: Sequence[Wrong]) -> None:
    columns = "kind", "fault", "model", "weights", "answers changed", "found, bfloat16", "rounds", "found, float32"
    print("\n| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for number, model, weights in sorted({(r.fault, r.model, r.weights) for r in records}):
        cells = [FAULTS[number].kind, FAULTS[number].what, model, weights]
        rounded, exact = (
            [r for r in records if (r.fault, r.model, r.weights, r.pair) == (number, model, weights, pair)]
            for pair in NUM_WRONG
        )
        rounds: dict[tuple[bool, int], bool] = {}
        for r in rounded:
            key = (r.is_greedy, r.number)
            rounds[key] = rounds.get(key, False) or (r.is_read and r.objection is not None)
        shares = [[r.differs for r in rounded], [bool(r.objection) for r in rounded], list(rounds.values())]
        cells += [percent(values) for values in [*shares, [bool(r.objection) for r in exact]]]
        print("| " + " | ".join(cells) + " |")


def percent(values: Sequence[bool]) -> str:
    return f"{sum(values) / len(values):.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=3400, help="right answers of each pair of dtypes, at least")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--no-faults", dest="faults", action="store_false", help="right answers alone")
    parser.add_argument("--models", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="MODEL")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    records: list[Right | Wrong] = []
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for found in pool.imap_unordered(examine, [(name, arguments) for name in arguments.models]):
            records += found
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {arguments.device}")
    show_right([record for record in records if isinstance(record, Right)])
    show_wrong([record for record in records if isinstance(record, Wrong)])
    print(f"\n{(time.perf_counter() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
