"""What choosing the next tokens costs on a GPU: tensor operations beside kernels, each as a CUDA graph.

    python benchmarks/choice.py [--vocab-size 152064] [--spread 3] [--output choice.json]

Prints ms per step, the median over replays, for random bfloat16 logits with a standard deviation of `--spread` (0.02: a
model without training).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from verl_valgen.backends.fast.choice import Choice
from verl_valgen.backends.fast.cuda_graph import CudaGraph
from verl_valgen.backends.observers import NanObserver
from verl_valgen.backends.sampling import GumbelNoise, logits_warpers

ROWS = (8, 64, 256)
PARAMETERS = {
    "greedy": None,
    "default": {"top_k": 50, "top_p": 0.7},
    "temperature": {"temperature": 0.7},
    "top_p": {"top_p": 0.95},
    "min_p": {"min_p": 0.05},
}
NUM_REPLAYS = 40


def choice_for(params: dict[str, float] | None, num_rows: int, vocab_size: int, device: torch.device) -> Choice:
    """What chooses for a strategy, `None` meaning greedy search."""
    processors = logits_warpers(params or {}, device)
    if params is not None:
        processors.append(GumbelNoise(0, [(row, 0) for row in range(num_rows)], 1, 1, device))
    processors.append(NanObserver(num_rows))
    return Choice(processors, vocab_size)


def milliseconds(choice: Choice, logits: Tensor, keys: Tensor) -> float:
    """The median time of a choice in a CUDA graph."""
    choose = CudaGraph(lambda: choice(logits, keys).tokens)
    for _ in range(4):
        choose()
    times = []
    for _ in range(NUM_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        choose()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=152064)
    parser.add_argument("--spread", type=float, default=3.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda")
    results = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ms per step")
    print(f"{'rows':>5} {'parameters':12} {'tensors':>9} {'kernels':>9}  {'same tokens':>11}")
    for num_rows in ROWS:
        generator = torch.Generator(device).manual_seed(num_rows)
        logits = torch.randn(num_rows, args.vocab_size, device=device, generator=generator) * args.spread
        logits = logits.to(torch.bfloat16)
        keys = torch.randint(-(2**62), 2**62, (num_rows,), device=device, generator=generator)
        for name, params in PARAMETERS.items():
            kernels, tensors = (choice_for(params, num_rows, args.vocab_size, device) for _ in range(2))
            tensors.for_kernels = None
            same = (kernels(logits, keys).tokens == tensors(logits, keys).tokens).float().mean().item()
            times = [milliseconds(choice, logits, keys) for choice in (tensors, kernels)]
            results.append({"rows": num_rows, "parameters": name, "tensors": times[0], "kernels": times[1]})
            print(f"{num_rows:>5} {name:12} {times[0]:9.3f} {times[1]:9.3f}  {same:11.3f}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
