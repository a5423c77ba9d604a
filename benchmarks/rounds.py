"""Measures rounds of every kind: time per token step, seconds per round and where they go, peak memory.

    make bench                       # small, on CPU
    torchrun --standalone --nproc-per-node=2 benchmarks/rounds.py --sizes 0.5B 7.6B --strategies fsdp2 fsdp --growth

Models have the shapes of Qwen2.5 and random weights, and no end-of-sequence token: every answer has its full length.
The prompts are of one length; parameters are the defaults (sampling). Times are medians, of whole calls between two
synchronisations of all ranks; a step's is the difference of two lengths, on one copy. Rank 0 prints tables as
docs/performance.md has them.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, ShardingStrategy
from transformers import GenerationConfig
from workload import SIZES, config_of, even_prompts, random_model

from verl_valgen.backends import backend_class
from verl_valgen.backends.base import Limits
from verl_valgen.backends.padding import left_pad
from verl_valgen.collectives import gather_values, rank, world_size
from verl_valgen.hosts.base import Host
from verl_valgen.records import Request, Round, RoundNumbers, Sample
from verl_valgen.rounds.generation import Answerer
from verl_valgen.rounds.planning import Planner
from verl_valgen.rounds.reading import Finding, Reading
from verl_valgen.rounds.restore import preserved_blas_workspaces
from verl_valgen.rounds.verification import verify
from verl_valgen.settings.load import GenerationSettings
from verl_valgen.trackers import open_trackers
from verl_valgen.trackers.base import TrackedRun

WAYS: dict[str, dict[str, Any]] = {
    "through the sharded model": {"gather": "sharded"},
    "Hugging Face's loop on a copy": {"backend": "hf"},
    "fast": {"backend": "fast"},
    "fast, compiled": {"backend": "fast", "compile": True},
}
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 128, 128
FEWER_TOKENS = 65
"""More than half of `NEW_TOKENS`, so that the cache has the same length, and inductor does not compile again."""


class BenchmarkHost(Host):
    """A sharded model without a trainer around it."""

    def __init__(self, model: nn.Module, config: Any, device: torch.device) -> None:
        super().__init__(trainer=None)
        self.model, self.config, self.device = model, config, device
        self.tokenizer: Any = SimpleNamespace(eos_token_id=None, pad_token_id=0, bos_token_id=None)
        self.compute_dtype = torch.bfloat16
        self.is_logging_rank = rank() == 0

    generation_config = GenerationConfig(pad_token_id=0)
    schedule = why_no_validation_batch = has_accelerator = launch_support = None  # type: ignore[assignment]


BenchmarkHost.__abstractmethods__ = frozenset()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--strategies", nargs="+", choices=["fsdp", "fsdp2"], default=["fsdp2"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--growth", action="store_true", help="how the time grows with samples, tokens and ranks")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()

    device = start()
    logging.getLogger("verl_valgen").setLevel(logging.WARNING)
    if rank() == 0:
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"{world_size()} x {name}; torch {torch.__version__}, transformers {transformers.__version__}")
    bandwidth = copy_bandwidth(device)
    for size in arguments.sizes:
        for strategy in arguments.strategies:
            model = random_model(config_of(size), device, torch.float32)
            host = BenchmarkHost(sharded(model, strategy, device), OmegaConf.create({}), device)
            compare(host, size, strategy, arguments, bandwidth)
            if arguments.growth and strategy == arguments.strategies[0]:
                show_growth(host, size, arguments.repetitions)
            del model, host
    dist.destroy_process_group()


def start() -> torch.device:
    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def sharded(model: nn.Module, strategy: str, device: torch.device) -> nn.Module:
    """Shards a float32 model as verl does it: a unit per decoder layer, bfloat16 mixed precision."""
    mesh = init_device_mesh(device.type, (world_size(),), mesh_dim_names=("fsdp",))
    if strategy == "fsdp":
        from verl.utils.fsdp_utils import get_fsdp_wrap_policy

        return FSDP(
            model,
            auto_wrap_policy=get_fsdp_wrap_policy(model, config={}, is_lora=False),
            device_id=device,
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            mixed_precision=MixedPrecision(torch.bfloat16, torch.float32, torch.float32),
            device_mesh=mesh,
        )
    from torch.distributed.fsdp import fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def compare(host: BenchmarkHost, size: str, strategy: str, arguments: argparse.Namespace, bandwidth: float) -> None:
    floor_ms = host.num_parameters * dtype(host).itemsize / bandwidth * 1e3
    billions = host.num_parameters / 1e9
    say(f"\n### {size} ({billions:.2f}B parameters), {strategy}, {world_size()} rank(s)\n")
    say(
        f"{NUM_PROMPTS} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new tokens. Floor: {floor_ms:.2f} ms, all "
        f"weights read once at the {bandwidth / 1e12:.2f} TB/s of a copy. "
        f"Writing the samples: {log_seconds(host):.4f} s.\n"
    )
    columns = ["ms per token step", "x floor", "round, s", "gather, s", "prefill, s", "decode, s", "first round, s"]
    columns += ["peak, bytes per parameter, by rank", "left, bytes"]
    say("| | " + " | ".join(columns) + " |")
    say("|---" * (len(columns) + 1) + "|")
    for way in arguments.ways:
        show_way(host, way, floor_ms, arguments.repetitions)
    show_check(host, arguments.repetitions)
    if "Hugging Face's loop on a copy" in arguments.ways:
        if rank() == 0:
            show_plain_generate(host, arguments.repetitions)
        else:
            host.gather(dtype(host), keep=False)
    dist.barrier()


def show_way(host: BenchmarkHost, way: str, floor_ms: float, repetitions: int) -> None:
    settings = GenerationSettings(enabled=True, max_new_tokens=NEW_TOKENS, **WAYS[way])
    first = seconds(lambda: answer(host, NUM_PROMPTS, settings))
    if settings.gather == "sharded":
        with MeasuredMemory(host) as memory:
            whole = seconds(lambda: answer(host, NUM_PROMPTS, settings))
        gather = 0.0
        fewer = seconds(lambda: answer(host, NUM_PROMPTS, replace(settings, max_new_tokens=FEWER_TOKENS)))
        prefill = seconds(lambda: answer(host, NUM_PROMPTS, replace(settings, max_new_tokens=1)))
        step_ms = (whole - fewer) / (NEW_TOKENS - FEWER_TOKENS) * 1e3
    else:
        with MeasuredMemory(host) as memory:
            whole = median(lambda: answer(host, NUM_PROMPTS, settings), repetitions)
        gather = median(lambda: dropped(host.gather(dtype(host), keep=rank() == 0)), repetitions)
        model = host.gather(dtype(host), keep=rank() == 0)  # held, so that steps are timed without it
        prefill = step_ms = 0.0
        if model is not None:
            times = {n: decoding_seconds(host, model, settings, n, repetitions) for n in (1, FEWER_TOKENS, NEW_TOKENS)}
            prefill = times[1]
            step_ms = (times[NEW_TOKENS] - times[FEWER_TOKENS]) / (NEW_TOKENS - FEWER_TOKENS) * 1e3
        del model
    say(
        f"| {way} | {step_ms:.2f} | {step_ms / floor_ms:.2f} | {whole:.2f} | {gather:.2f} | {prefill:.2f} | "
        f"{whole - gather - prefill:.2f} | {first:.2f} | {memory.peaks} | {memory.left} |"
    )


def show_check(host: BenchmarkHost, repetitions: int) -> None:
    """What the check of a round's answers takes, the forward pass of the sharded model included."""
    say("\n| the check of a round's answers | verified | s | one reading, s | first check, s |\n|---|---|---|---|---|")
    for name, chosen in (("greedy", {"do_sample": False}), ("default", {})):
        settings = GenerationSettings(enabled=True, max_new_tokens=NEW_TOKENS, **chosen)
        answerer = Answerer(host, settings)
        asked = requests(NUM_PROMPTS, settings.parameters)
        completions = answerer(asked)
        reading = Reading(host, answerer.special_tokens(), settings.seed, answerer.planner.dtype)
        found: list[Finding] = []
        first = seconds(lambda: found.append(verify(reading, asked, completions)))  # noqa: B023  (called at once)
        whole = median(lambda: found.append(verify(reading, asked, completions)), repetitions)  # noqa: B023
        ids = [*asked[0].input_ids, *range(5, 5 + NEW_TOKENS - 1)]
        one = median(lambda: dropped(host.read(ids, NEW_TOKENS)), repetitions)  # noqa: B023
        say(f"| {name} | {[finding.verified for finding in found]} | {whole:.3f} | {one:.3f} | {first:.3f} |")
    say("")


@torch.no_grad()
def decoding_seconds(
    host: BenchmarkHost, model: Any, settings: GenerationSettings, num_tokens: int, repetitions: int
) -> float:
    """Median seconds of a backend from requests to completions: prefill, capture and steps."""
    model.generation_config = host.generation_config
    parameters = settings.parameters | {"max_new_tokens": num_tokens}
    limits = Limits(NUM_PROMPTS, compile=settings.compile)

    def generate() -> None:
        cls = backend_class(settings.backend, host.device.type)
        cls(model, host.tokenizer, settings.seed, limits).generate(requests(NUM_PROMPTS, parameters))

    with preserved_blas_workspaces(host.device):
        generate()
        return statistics.median(timed(generate, host.device) for _ in range(repetitions))


def show_plain_generate(host: BenchmarkHost, repetitions: int) -> None:
    """Prints how long transformers' own sampling takes on the same kind of copy, without code of ours.

    Collective: the other ranks must call `host.gather`.
    """
    model: Any = host.gather(dtype(host), keep=True)
    ids, mask = left_pad([request.input_ids for request in requests(NUM_PROMPTS, {})], host.device)

    @torch.no_grad()
    def generate(num_tokens: int) -> None:
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=50, top_p=0.7, pad_token_id=0, max_new_tokens=num_tokens
        )
        model.generate(ids, attention_mask=mask, generation_config=config, synced_gpus=False)

    settings = GenerationSettings(enabled=True, backend="hf")
    generate(FEWER_TOKENS)
    theirs, ours = [], []
    for _ in range(repetitions):  # in turns: the machine may be slower for a while
        theirs.append(timed(lambda: generate(NEW_TOKENS), host.device))
        ours.append(decoding_seconds(host, model, settings, NEW_TOKENS, 1))
    say(
        f"\nOn the same copy, {NEW_TOKENS} tokens: transformers' own sampling {statistics.median(theirs):.3f} s, "
        f"the `hf` backend {statistics.median(ours):.3f} s, "
        f"ratio {statistics.median(ours) / statistics.median(theirs):.3f}."
    )


def show_growth(host: BenchmarkHost, size: str, repetitions: int) -> None:
    """Prints seconds of whole rounds with the defaults, gather included; a first one, not counted, warms up."""
    small = host.device.type == "cpu"
    say(f"\n#### {size}: how a round grows, seconds ({PROMPT_TOKENS} prompt tokens; defaults otherwise)\n")

    def row(title: str, cases: dict[Any, tuple[int, GenerationSettings]]) -> None:
        times = {}
        for name, (num_prompts, settings) in cases.items():
            answer(host, num_prompts, settings)
            times[name] = median(partial(answer, host, num_prompts, settings), 1 if small else repetitions)
        say(f"- {title}: " + ", ".join(f"{name}: {value:.2f}" for name, value in times.items()))

    def settings(num_tokens: int, **others: Any) -> GenerationSettings:
        return GenerationSettings(enabled=True, max_new_tokens=num_tokens, **others)

    samples = (1, 8, 16) if small else (1, 8, 32, 64, 128, 512)
    row("samples (64 tokens each)", {n: (n, settings(64)) for n in samples})
    row("tokens (8 samples)", {n: (8, settings(n)) for n in ((16, 32) if small else (16, 64, 256, 1024))})
    many = 16 if small else 64
    for batch_size in (4,) if small else (8, 16, 32, 64):
        row(
            f"ranks ({many} samples, 64 tokens each, batches of {batch_size})",
            {n: (many, settings(64, batch_size=batch_size, ranks=n)) for n in range(1, world_size() + 1)},
        )


def requests(number: int, params: Mapping[str, Any]) -> list[Request]:
    return [Request(prompt, (row, 0), params) for row, prompt in enumerate(even_prompts(number, PROMPT_TOKENS))]


def answer(host: BenchmarkHost, num_prompts: int, settings: GenerationSettings) -> None:
    completions = Answerer(host, settings)(requests(num_prompts, settings.parameters))
    if completions is not None:
        assert [len(completion.output_ids) for completion in completions] == [settings.max_new_tokens] * num_prompts


def dtype(host: BenchmarkHost) -> torch.dtype:
    return Planner(host, GenerationSettings(enabled=True)).dtype


def dropped(value: object) -> None:
    """Takes a value, so that nobody keeps it."""


def log_seconds(host: BenchmarkHost) -> float:
    """Median seconds for writing a round's samples to the JSONL file and the console."""
    samples = [
        Sample(1, i, i, "default", 0, "p" * 500, "p" * 400, "g" * 500, "r" * 50, "length", 128, 128, 0)
        for i in range(NUM_PROMPTS)
    ]
    if rank() != 0:
        return 0.0
    finished = Round(1, samples, RoundNumbers(len(samples), 1.0, 1.0))
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        trackers = open_trackers(["console"], TrackedRun(Path(folder), GenerationSettings(enabled=True)))
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            return statistics.median(timed(lambda: trackers.log(finished), host.device) for _ in range(3))
        finally:
            sys.stdout = stdout


def timed(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of a call until all ranks are done. Collective: all ranks must call."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")

    def call_and_wait() -> None:
        call()
        synchronize(device)
        dist.barrier()

    dist.barrier()
    return timed(call_and_wait, device)


def median(call: Callable[[], Any], repetitions: int) -> float:
    return statistics.median(seconds(call) for _ in range(repetitions))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class MeasuredMemory:  # used as a context manager
    """Memory above the level before, of all ranks, at its peak and at the end. Collective: all ranks must use it."""

    peaks, left = "-", "-"

    def __init__(self, host: BenchmarkHost) -> None:
        self.host = host

    def __enter__(self) -> MeasuredMemory:
        if self.host.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.host.device.type == "cuda":
            peak, left = torch.cuda.max_memory_allocated() - self.before, torch.cuda.memory_allocated() - self.before
            figures = gather_values([peak / self.host.num_parameters, left], self.host.device)
            self.peaks = ", ".join(f"{peak:.3f}" for peak, _ in figures)
            self.left = ", ".join(str(left) for _, left in figures)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    num_bytes = 4 * 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * num_bytes / statistics.median(timed(lambda: target.copy_(source), device) for _ in range(5))


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
