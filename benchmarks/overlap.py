"""Measures what a round costs training that goes on meanwhile (`generation.overlap`), beside a round that it waits for.

    python benchmarks/overlap.py                                  # small, on CPU
    torchrun --standalone --nproc-per-node=2 benchmarks/overlap.py --size 3B --tokens 1024

Training is FSDP2 with gradient checkpointing, AdamW in float32 and bfloat16 mixed precision, on random tokens; rounds
are the package's own, from the gather to the recorder, with the check of the answers. Answers have their full length. A
step ends when its loss is on the host, as verl's does. Rank 0 prints the table of docs/performance.md: medians over the
repetitions, of steps over all steps.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from omegaconf import OmegaConf
from rounds import PROMPT_TOKENS, SIZES, BenchmarkHost, say, seconds, start, synchronize
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Qwen2Config, Qwen2ForCausalLM

from verl_valgen.collectives import gather_values, rank, world_size
from verl_valgen.records import Prompt, ProvenAnswers, Query, Round, RoundNumbers
from verl_valgen.rounds.local import LocalAnswerer
from verl_valgen.rounds.queries import make_queries
from verl_valgen.rounds.rounds import ValidationRounds
from verl_valgen.settings.load import GenerationSettings

ALL_SIZES: dict[str, dict[str, Any]] = SIZES | {
    "1.5B": {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "3B": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
COLUMNS = (
    "round", "blocking, s", "training waits, s", "of it gather, ready, comparison", "slowed by in all, s",
    "cost / blocking", "step alone, ms", "beside answers, ms", "ratio", "first step after, ms", "steps beside",
)  # fmt: skip


class Training:
    """A model in training, as verl trains it."""

    def __init__(self, size: str, num_sequences: int, num_tokens: int, device: torch.device) -> None:
        torch.manual_seed(0)
        config = Qwen2Config(**ALL_SIZES[size], use_sliding_window=False)
        with device:
            self.model: Any = Qwen2ForCausalLM(config)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        mesh = init_device_mesh(device.type, (world_size(),), mesh_dim_names=("fsdp",))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device.type == "cuda")
        self.shape, self.device = (num_sequences, num_tokens), device
        self.generator = torch.Generator(device).manual_seed(rank())

    def step(self) -> float:
        """One step; its seconds."""
        began_at = time.perf_counter()
        ids = torch.randint(5, 1000, self.shape, device=self.device, generator=self.generator)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - began_at


class Recorded:
    """Stands for the recorder: asks, and counts what comes."""

    def __init__(self, queries: list[Query]) -> None:
        self.queries, self.num_rounds = queries, 0

    def judge(self, queries: list[Query], proven: ProvenAnswers, step: int, seconds: float) -> Round:
        expected = [query.params["max_new_tokens"] for query in queries]
        assert [len(completion.output_ids) for completion in proven.completions] == expected
        assert proven.verified is not False
        return Round(step, [], RoundNumbers(len(queries), seconds, 0.0))

    def record(self, round: Round) -> None:
        self.num_rounds += 1


@dataclass
class Measured:
    """A round's figures, in seconds."""

    waits: float
    parts: tuple[float, ...]
    steps: list[float]
    """Of all training steps behind it, in their order, with what was done for the round between them."""
    num_beside: int
    """Steps that began while answers were made, the first of all. The answers are recorded before the one behind."""
    left_over: float
    """What there was still to wait for behind the last step."""

    @property
    def beside(self) -> list[float]:
        """Of the steps that began and ended while answers were made, but the first."""
        return self.steps[1 : self.num_beside - 1]

    @property
    def behind(self) -> list[float]:
        """Of the steps that nothing was done beside."""
        return self.steps[self.num_beside + 1 :]

    def slowed_by(self, alone: float) -> float:
        """How much longer training took from the first step to the one before which the answers were recorded."""
        concerned = self.steps[: self.num_beside + 1]
        return sum(concerned) - len(concerned) * alone + self.left_over


class Waits(logging.Handler):
    """Notes how long training waited for what, as the package tells at level DEBUG."""

    parts: tuple[float, ...] = ()

    def emit(self, record: logging.LogRecord) -> None:
        if "training waited" in record.msg:
            assert isinstance(record.args, tuple)
            self.parts = tuple(float(value) for value in record.args[1:])  # type: ignore[arg-type]


def new_rounds(host: BenchmarkHost, num_prompts: int, num_tokens: int, *, overlap: bool) -> ValidationRounds:
    settings = GenerationSettings(enabled=True, max_new_tokens=num_tokens, overlap=overlap)
    rounds: Any = ValidationRounds(host, settings)
    rounds.answerer = LocalAnswerer(host, settings)
    if host.is_logging_rank:
        ids = [[5 + (row * 37 + i) % 1000 for i in range(PROMPT_TOKENS)] for row in range(num_prompts)]
        rounds.recorder = Recorded(
            make_queries([Prompt(row, row_ids, "", None) for row, row_ids in enumerate(ids)], settings)
        )
    return rounds


def blocking_seconds(host: BenchmarkHost, training: Training, case: tuple[int, int], repetitions: int) -> float:
    """Of rounds that training waits for, behind one that warms up, with a step in between."""
    rounds = new_rounds(host, *case, overlap=False)
    times = []
    for step in range(repetitions + 1):
        training.step()
        times.append(seconds(lambda: rounds.run(step)))  # noqa: B023  (called at once)
    return statistics.median(times[1:])


def beside_training(
    rounds: ValidationRounds, training: Training, waits: Waits, num_steps: int, number: int
) -> Measured:
    """A round that training goes on beside, and enough steps for it to end."""
    rounds.at_batch()
    training.step()
    waited = seconds(lambda: rounds.run(number))
    steps, num_beside = [], 0
    for _ in range(num_steps):
        began_at = time.perf_counter()
        rounds.at_batch()
        handed_over = time.perf_counter() - began_at
        num_beside += rounds.under_way is not None
        steps.append(handed_over + training.step())
    began_at = time.perf_counter()
    rounds.record_under_way()
    return Measured(waited, waits.parts, steps, num_beside, time.perf_counter() - began_at)


def show_case(
    host: BenchmarkHost, training: Training, case: tuple[int, int], waits: Waits, repetitions: int, *, verbose: bool
) -> None:
    blocking = blocking_seconds(host, training, case, repetitions)
    alone_s = [training.step() for _ in range(12)]
    rounds = new_rounds(host, *case, overlap=True)
    # The same number of steps on all ranks, of which one alone knows when the answers are there.
    num_steps, *_ = gather_values(math.ceil(1.6 * blocking / statistics.median(alone_s)) + 5, host.device)
    measured = [beside_training(rounds, training, waits, num_steps, number) for number in range(repetitions + 1)][1:]
    # (the first warms up)
    if rounds.recorder is not None:
        recorder: Any = rounds.recorder
        assert recorder.num_rounds == repetitions + 1, "a round failed"
    # The clock of a device under load drifts by a few per cent: what is alone is taken from the whole time.
    alone_s += [value for one in measured for value in one.behind] + [training.step() for _ in range(6)]
    alone = statistics.median(alone_s)
    synchronize(host.device)
    slowed = [one.slowed_by(alone) for one in measured]
    costs = [one.waits + slow for one, slow in zip(measured, slowed, strict=True)]
    steps = [value for one in measured for value in one.beside]

    def median_of(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    parts = [f"{statistics.median(part):.2f}" for part in zip(*(one.parts for one in measured), strict=True)]
    cells = [
        f"{case[0]} x {case[1]}", f"{blocking:.2f}", median_of([one.waits for one in measured]), " + ".join(parts),
        median_of(slowed), median_of([cost / blocking for cost in costs]),
        f"{alone * 1e3:.0f}", f"{statistics.median(steps) * 1e3:.0f}" if steps else "-",
        f"{statistics.median(steps) / alone:.3f}" if steps else "-",
        f"{statistics.median([one.steps[0] for one in measured]) * 1e3:.0f}", str(len(steps)),
    ]  # fmt: skip
    say("| " + " | ".join(cells) + " |")
    for one in measured if verbose else ():
        steps_ms = [f"{value * 1e3:.0f}" for value in one.steps]
        say(f"  waited {one.waits:.3f} s; steps, ms: {' '.join(steps_ms)}; {one.num_beside} of them beside answers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=ALL_SIZES, default="small")
    parser.add_argument("--rounds", nargs="+", default=None, help="prompts x tokens, such as 8x512")
    parser.add_argument("--sequences", type=int, default=8, help="of a training step on each rank")
    parser.add_argument("--tokens", type=int, default=64, help="of each of these")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--verbose", action="store_true", help="the time of every step")
    arguments = parser.parse_args()

    device = start()
    waits = Waits()
    package = logging.getLogger("verl_valgen")
    package.setLevel(logging.DEBUG)
    package.addHandler(waits)
    warnings = logging.StreamHandler()
    warnings.setLevel(logging.WARNING)
    package.addHandler(warnings)
    package.propagate = False
    if rank() == 0:
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"{world_size()} x {name}; torch {torch.__version__}, transformers {transformers.__version__}")
    training = Training(arguments.size, arguments.sequences, arguments.tokens, device)
    host = BenchmarkHost(training.model, OmegaConf.create({}), device)
    host.tokenizer = SimpleNamespace(eos_token_id=None, pad_token_id=0, bos_token_id=None)
    for _ in range(3):
        training.step()
    say(
        f"\n{arguments.size} ({host.num_parameters / 1e9:.2f}B parameters), {world_size()} rank(s), "
        f"{arguments.sequences} x {arguments.tokens} tokens a rank\n"
    )
    say("| " + " | ".join(COLUMNS) + " |")
    say("|---" * len(COLUMNS) + "|")
    default = ["8x128", "8x512"] if device.type == "cuda" else ["4x32"]
    for text in arguments.rounds or default:
        num_prompts, num_tokens = map(int, text.split("x"))
        show_case(host, training, (num_prompts, num_tokens), waits, arguments.repetitions, verbose=arguments.verbose)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
