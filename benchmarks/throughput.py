"""Measures many answers of uneven length on one device, beside another version of this package and beside vLLM.

    make bench                                             # small, on CPU
    git worktree add /tmp/before 66577f1                   # some other version
    python benchmarks/throughput.py --size 7.6B --base /tmp/before --vllm /tmp/vllm --profile
    torchrun --standalone --nproc-per-node=4 benchmarks/throughput.py --size 7.6B

`--vllm` is what vLLM's process has as PYTHONPATH ("" where vLLM is installed). Every side has a process of its own, one
after the other: the package beside this file ("ours"), that under `--base`, and vLLM.

The model has the shape of Qwen2.5 and random weights in bfloat16 (float32 on CPU). "Answers": prompts of 60 to 200
tokens, sampled with temperature 1 alone; the number of new tokens is geometric with a mean of 150, at most 512; timed
once behind a warm-up; memory is that beside the weights. vLLM's engine is up, its graphs captured; of ours each call of
`generate` captures its own. "Steps": prompts of 128 tokens and 128 new tokens each, medians; a step is the difference
of two lengths, and a token the whole call with prefill and capture, divided by the number of tokens.

Under torchrun it measures instead how one rank answers N prompts, two 2 N, four 4 N: rounds of an FSDP2 model, each
rank with a copy of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from workload import (
    EOS_ID,
    MEAN_NEW_TOKENS,
    MOST_NEW_TOKENS,
    PARAMETERS,
    SIZES,
    config_of,
    end_after_a_geometric_number_of_tokens,
    even_prompts,
    random_model,
    uneven_prompts,
)

HERE = Path(__file__).resolve().parent
PROMPT_TOKENS, FEWER_TOKENS, NEW_TOKENS = 128, 65, 128
"""Of the steps. Both numbers of new tokens need a cache of the same length."""
PROFILED = ("greedy", "temperature")
PROFILED_KERNELS = 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--prompts", type=int, help="of the answers; 0: none")
    parser.add_argument("--rows", type=int, nargs="+", help="batch sizes of the answers")
    parser.add_argument("--base-rows", type=int, nargs="+", help="those of the other version; default: the same")
    parser.add_argument("--step-rows", type=int, nargs="*", help="batch sizes of the steps")
    parser.add_argument("--kinds", nargs="+", choices=PARAMETERS, default=list(PARAMETERS), help="of the steps")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--base", help="folder of another version of this package")
    parser.add_argument("--vllm", help="PYTHONPATH of vLLM's process")
    parser.add_argument("--sides", nargs="+", choices=["ours", "base", "vllm"], default=["ours", "base", "vllm"])
    parser.add_argument("--profile", action="store_true", help="which kernels a step consists of")
    parser.add_argument("--logs", type=Path, help="folder for what the processes print")
    parser.add_argument("--is-side", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    small = not torch.cuda.is_available()
    arguments.prompts = (16 if small else 1024) if arguments.prompts is None else arguments.prompts
    arguments.rows = arguments.rows or ([4, 8] if small else [64, 128, 256])
    if arguments.step_rows is None:
        arguments.step_rows = [2] if small else [8, 64, 256]
    if arguments.is_side:
        measure_package(arguments)
    elif "RANK" in os.environ:
        measure_ranks(arguments)
    else:
        compare(arguments)


# The side of this package, of whatever version. It prints lines of JSON.


@torch.no_grad()
def measure_package(arguments: argparse.Namespace) -> None:
    logging.getLogger("verl_valgen").setLevel(logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    package = resolve_name("verl_valgen").__path__[0]
    say("machine", name=name, torch=torch.__version__, transformers=transformers.__version__, package=package)
    if arguments.prompts:
        attempt(lambda: measure_answers(arguments, device))
    if arguments.step_rows:
        attempt(lambda: measure_steps(arguments, device))


def measure_answers(arguments: argparse.Namespace, device: torch.device) -> None:
    # The random weights of the small shape do not matter, those of the head must be its own.
    model = random_model(config_of(arguments.size, tie_word_embeddings=False), device, dtype_on(device))
    mean, most = lengths_on(device)
    end_after_a_geometric_number_of_tokens(model, mean)
    requests = make_requests(
        uneven_prompts(arguments.prompts, model.config.vocab_size), max_new_tokens=most, **PARAMETERS["temperature"]
    )
    for rows in arguments.rows:
        generate(model, requests[:rows], rows, EOS_ID)  # warms up
        before = memory(peak=False)
        taken, completions = timed(lambda: generate(model, requests, rows, EOS_ID), device)  # noqa: B023
        num_tokens = sum(len(completion.output_ids) for completion in completions)
        peak, left = memory(peak=True) - before, memory(peak=False) - before
        figures = {"peak_gib": peak / 2**30, "left_bytes": left}
        say("answers", rows=rows, seconds=taken, prompts=len(completions), tokens=num_tokens, **figures)


def measure_steps(arguments: argparse.Namespace, device: torch.device) -> None:
    model = random_model(config_of(arguments.size), device, dtype_on(device))
    prompt_tokens, fewer, most = step_lengths_on(device)
    for rows in arguments.step_rows:
        prompts = even_prompts(rows, prompt_tokens)
        for name in arguments.kinds:
            chosen = PARAMETERS[name]

            def run(num_tokens: int) -> None:
                requests = make_requests(prompts, max_new_tokens=num_tokens, **chosen)  # noqa: B023
                completions = generate(model, requests, rows, None)  # noqa: B023
                assert {len(completion.output_ids) for completion in completions} == {num_tokens}

            run(most)
            times = {
                number: statistics.median(
                    timed(lambda: run(number), device)[0]  # noqa: B023
                    for _ in range(arguments.repetitions)
                )
                for number in (fewer, most)
            }
            step = (times[most] - times[fewer]) / (most - fewer)
            say("steps", rows=rows, parameters=name, step_ms=step * 1e3, token_ms=times[most] / most * 1e3)
            if arguments.profile and name in PROFILED and rows in (min(arguments.step_rows), max(arguments.step_rows)):
                kernels = kernels_of_a_step(run, fewer, most)
                say("profile", rows=rows, parameters=name, kernels=kernels)


def kernels_of_a_step(run: Callable[[int], None], fewer: int, most: int) -> list[list[Any]]:
    """Name, number and microseconds of the kernels of a step: the difference of two lengths. Empty on CPU."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    if not torch.cuda.is_available():
        return []
    for num_tokens, sign in ((fewer, -1), (most, 1)):
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            run(num_tokens)
            torch.cuda.synchronize()
        for event in profile.key_averages():
            totals[event.key][0] += sign * event.count / (most - fewer)
            totals[event.key][1] += sign * event.self_device_time_total / (most - fewer)
    return sorted(([name, *figures] for name, figures in totals.items()), key=lambda row: -row[2])


def generate(model: Any, requests: list[Any], rows: int, eos_id: int | None) -> list[Any]:
    from verl_valgen.backends import backend_class
    from verl_valgen.backends.base import Limits

    model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=eos_id)
    tokenizer: Any = SimpleNamespace(eos_token_id=eos_id, pad_token_id=0, bos_token_id=None)
    return backend_class("fast", model.device.type)(model, tokenizer, 0, Limits(rows)).generate(requests)


def make_requests(prompts: list[list[int]], **settings: Any) -> list[Any]:
    from verl_valgen.records import Request
    from verl_valgen.settings.load import GenerationSettings

    parameters = GenerationSettings(enabled=True, **settings).parameters
    return [Request(prompt, (row, 0), parameters) for row, prompt in enumerate(prompts)]


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def lengths_on(device: torch.device) -> tuple[int, int]:
    """The mean of the answers' numbers of tokens, and the most."""
    return (MEAN_NEW_TOKENS, MOST_NEW_TOKENS) if device.type == "cuda" else (8, 24)


def step_lengths_on(device: torch.device) -> tuple[int, int, int]:
    """Numbers of tokens of the steps' prompts, and of new ones in the shorter and the longer run."""
    return (PROMPT_TOKENS, FEWER_TOKENS, NEW_TOKENS) if device.type == "cuda" else (16, 9, 16)


def memory(*, peak: bool) -> int:
    """Bytes that are allocated, or the most since this was last asked without `peak`. 0 on CPU."""
    if not torch.cuda.is_available():
        return 0
    if peak:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = call()
    synchronize()
    return time.perf_counter() - start, result


def attempt(measure: Callable[[], None]) -> None:
    """Measures, and says what went wrong, so that one failure does not lose what comes behind."""
    try:
        measure()
    except Exception as e:
        say("failed", error=f"{type(e).__name__}: {str(e)[:500]}")
        logging.getLogger().exception("failed")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(what: str, **figures: Any) -> None:
    print(json.dumps({"what": what} | figures), flush=True)


# The comparison: one process after the other, and tables of what they said.


def compare(arguments: argparse.Namespace) -> None:
    logs = arguments.logs or Path(tempfile.mkdtemp())
    logs.mkdir(parents=True, exist_ok=True)
    common = ["--size", arguments.size, "--prompts", str(arguments.prompts)]
    steps = [str(rows) for rows in arguments.step_rows]
    own = [*common, "--is-side", "--repetitions", str(arguments.repetitions), "--step-rows", *steps]
    kinds = ["--kinds", *arguments.kinds]
    own += [*kinds, "--profile"] if arguments.profile else kinds

    def rows(numbers: list[int]) -> list[str]:
        return ["--rows", *map(str, numbers)]

    lengths = [str(PROMPT_TOKENS), str(FEWER_TOKENS), str(NEW_TOKENS)]
    sides = {
        "ours": (str(HERE.parent), [str(HERE / "throughput.py"), *own, *rows(arguments.rows)]),
        "base": (arguments.base, [str(HERE / "throughput.py"), *own, *rows(arguments.base_rows or arguments.rows)]),
        "vllm": (
            arguments.vllm,
            [str(HERE / "vllm_throughput.py"), *common, "--lengths", *lengths, "--even-rows", *steps, *kinds],
        ),
    }
    found = {
        side: list(records(side, path, command, logs))
        for side, (path, command) in sides.items()
        if side in arguments.sides and path is not None
    }
    for machine in next(iter(found.values()), [])[:1]:
        print(f"\n{arguments.size}; {machine}")
    show_answers(found)
    show_steps(found)
    show_profiles(found)


def records(side: str, path: str, command: list[str], logs: Path) -> Iterator[dict[str, Any]]:
    """Runs a side and yields what it measured, as soon as it says it."""
    log, own_path = logs / f"{side}.log", os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in (path, own_path) if part)}
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            file.flush()
            if line.startswith('{"what": '):
                record = json.loads(line)
                print(f"{side}: {line[:200].strip()}", flush=True)
                yield record
    if process.returncode:
        print(f"{side}: ended with status {process.returncode}: {log}\n{log.read_text()[-1500:]}", flush=True)


def show_answers(found: dict[str, list[dict[str, Any]]]) -> None:
    print("\n| answers | rows | seconds | tokens | tokens/s | peak, GiB | left, bytes |\n|---|---|---|---|---|---|---|")
    for side, measured in found.items():
        for it in measured:
            if it["what"] == "answers":
                per_second = it["tokens"] / it["seconds"]
                figures = f"{it['seconds']:.2f} | {it['tokens']} | {per_second:.0f}"
                figures += f" | {it['peak_gib']:.1f} | {it['left_bytes']}" if "peak_gib" in it else " | - | -"
                print(f"| {side}, {it['prompts']} prompts | {it['rows']} | {figures} |")


def show_steps(found: dict[str, list[dict[str, Any]]]) -> None:
    """A step, and behind the stroke a token of the whole call."""
    print("\n| ms per step / per token | " + " | ".join(PARAMETERS) + " |" + "\n|---" + "|---" * len(PARAMETERS) + "|")
    for side, measured in found.items():
        cells: dict[int, dict[str, str]] = defaultdict(dict)
        for it in measured:
            if it["what"] == "steps":
                cells[it["rows"]][it["parameters"]] = f"{it['step_ms']:.2f} / {it['token_ms']:.2f}"
        for rows, of_parameters in cells.items():
            print(f"| {side}, {rows} rows | " + " | ".join(of_parameters.get(name, "-") for name in PARAMETERS) + " |")


def show_profiles(found: dict[str, list[dict[str, Any]]]) -> None:
    for side, measured in found.items():
        for it in measured:
            if it["what"] == "profile" and it["kernels"]:
                whole, number = (sum(kernel[i] for kernel in it["kernels"]) for i in (2, 1))
                title = f"{side}, {it['rows']} rows, {it['parameters']}: {number:.0f} kernels, {whole / 1e3:.2f} ms"
                print(f"\n| {title} | number | ms |\n|---|---|---|")
                for name, count, microseconds in it["kernels"][:PROFILED_KERNELS]:
                    print(f"| {name[:90].replace('|', '/')} | {count:.1f} | {microseconds / 1e3:.3f} |")


# Several ranks, through the package's own rounds.


def measure_ranks(arguments: argparse.Namespace) -> None:
    """Collective: all ranks must call."""
    import torch.distributed as dist
    from omegaconf import OmegaConf
    from rounds import BenchmarkHost, dropped, dtype, say, seconds, sharded, start, world_size

    from verl_valgen.rounds.generation import Answerer
    from verl_valgen.settings.load import GenerationSettings

    device = start()
    logging.getLogger("verl_valgen").setLevel(logging.WARNING)
    mean, most = lengths_on(device)
    model = random_model(config_of(arguments.size, tie_word_embeddings=False), device, torch.float32)
    end_after_a_geometric_number_of_tokens(model, mean)
    host = BenchmarkHost(sharded(model, "fsdp2", device), OmegaConf.create({}), device)
    host.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=EOS_ID)
    prompts = uneven_prompts(arguments.prompts * world_size(), SIZES[arguments.size]["vocab_size"])
    gather = seconds(lambda: dropped(host.gather(dtype(host), keep=True)))
    say(f"\n| answers, rounds with gather ({gather:.2f} s) | prompts | seconds | tokens | of one rank's time |")
    say("|---|---|---|---|---|")
    chosen = PARAMETERS["temperature"] | {"max_new_tokens": most}
    taken: dict[int, float] = {}

    def answer(num_prompts: int, num_ranks: int) -> list[Any]:
        settings = GenerationSettings(enabled=True, backend="fast", ranks=num_ranks, console="none", **chosen)
        return Answerer(host, settings)(make_requests(prompts[:num_prompts], **chosen)) or []

    answer(min(64 * world_size(), len(prompts)), world_size())  # warms all ranks up
    for num_ranks in [2**i for i in range(world_size().bit_length())]:
        number, answers = arguments.prompts * num_ranks, []
        taken[num_ranks] = seconds(lambda: answers.extend(answer(number, num_ranks)))  # noqa: B023
        num_tokens = sum(len(it.output_ids) for it in answers)
        ratio = taken[num_ranks] / taken[1]
        say(f"| {num_ranks} rank(s) | {number} | {taken[num_ranks]:.2f} | {num_tokens} | {ratio:.2f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
