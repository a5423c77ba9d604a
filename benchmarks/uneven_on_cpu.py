"""How long 64 answers of uneven length take on CPU, beside another version of the package.

    python benchmarks/uneven_on_cpu.py --base ../before --base-backend hf

Two Qwen2 of 4 layers with random weights, hidden size 64 and 256, in float32 and one thread; prompts of 5 to 40 tokens;
temperature 1 alone, one token in 24 ends an answer, at most 96. The versions take turns, so that a busy machine slows
both; the least of several times counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NUM_REQUESTS, MEAN_LENGTH, MOST_NEW_TOKENS = 64, 24, 96
SHAPES: dict[str, dict[str, int]] = {
    "hidden size 64": {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 160, "num_attention_heads": 4,
                       "num_key_value_heads": 2},
    "hidden size 256": {"hidden_size": 256, "intermediate_size": 688, "vocab_size": 2000, "num_attention_heads": 8,
                        "num_key_value_heads": 4},
}  # fmt: skip


def measure(backend_name: str, repeats: int) -> dict[str, Any]:
    """The least time, in seconds, and the number of tokens, by shape; of the package that is imported."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    from verl_valgen.backends import backend_class
    from verl_valgen.backends.base import Limits
    from verl_valgen.records import Request

    torch.set_num_threads(1)
    results = {}
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        model: Any = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=4, max_position_embeddings=2048, **shape)).eval()
        model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
        size, rng = shape["vocab_size"], random.Random(0)
        params = {
            "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": MOST_NEW_TOKENS,
            "eos_token_id": list(range(2, 2 + round(size / MEAN_LENGTH))),
        }  # fmt: skip
        prompts = [[rng.randrange(size // 2, size) for _ in range(rng.randint(5, 40))] for _ in range(NUM_REQUESTS)]
        requests = [Request(prompt, (row, 0), params) for row, prompt in enumerate(prompts)]
        times = []
        for _ in range(repeats + 1):  # the first one tries the model
            start = time.perf_counter()
            with torch.no_grad():
                answers = backend_class(backend_name, "cpu")(model, Any, 0, Limits(NUM_REQUESTS)).generate(requests)  # type: ignore[arg-type]
            times.append(time.perf_counter() - start)
        results[name] = [min(times[1:]), sum(len(answer.output_ids) for answer in answers)]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--base-backend", default="hf")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--measure", metavar="BACKEND", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, repeats=3)))
        return
    here = Path(__file__).resolve().parents[1]
    versions = [("here", here, args.backend)] + ([("base", args.base, args.base_backend)] if args.base else [])
    best: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.turns):
        for version, directory, backend in versions:
            done = subprocess.run(
                [sys.executable, __file__, "--measure", backend], check=True, capture_output=True, text=True,
                env=os.environ | {"PYTHONPATH": str(directory.resolve()), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            for shape, (seconds, num_tokens) in json.loads(done.stdout.splitlines()[-1]).items():
                previous = best.get((shape, version), [seconds, num_tokens])
                best[shape, version] = [min(seconds, previous[0]), num_tokens]
    for (shape, version), (seconds, num_tokens) in best.items():
        base = best.get((shape, "base"))
        ratio = "" if base is None or version == "base" else f", {seconds / base[0]:.2f} x"
        print(f"{shape}, {version}: {seconds:.2f} s for {num_tokens:.0f} tokens{ratio}")


if __name__ == "__main__":
    main()
