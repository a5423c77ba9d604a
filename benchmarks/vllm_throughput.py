"""The side of vLLM in benchmarks/throughput.py, which starts it in a process and an environment of its own.

Knows nothing of this package. Prints one line of JSON for each measurement, among vLLM's own lines.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from typing import Any

from workload import MEAN_NEW_TOKENS, MOST_NEW_TOKENS, PARAMETERS, SIZES, config_of, even_prompts, uneven_prompts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--even-rows", type=int, nargs="*", default=[])
    parser.add_argument("--kinds", nargs="+", choices=PARAMETERS, required=True)
    parser.add_argument("--lengths", type=int, nargs=3, required=True, help="of even prompts, and two of even answers")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    began = time.perf_counter()
    config = config_of(arguments.size, architectures=["Qwen2ForCausalLM"], dtype="bfloat16")
    folder = tempfile.mkdtemp()
    config.save_pretrained(folder)
    import vllm

    engine = vllm.LLM(
        model=folder,
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.85,
        max_model_len=1024,
        max_num_seqs=arguments.max_num_seqs,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    say("engine ready", version=vllm.__version__, seconds=time.perf_counter() - began)

    def seconds(prompts: list[list[int]], warm_up: int, **parameters: Any) -> tuple[float, list[int]]:
        sampling = vllm.SamplingParams(detokenize=False, **parameters)
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        if warm_up:
            engine.generate(inputs[:warm_up], sampling, use_tqdm=False)
        start = time.perf_counter()
        outputs = engine.generate(inputs, sampling, use_tqdm=False)
        taken = time.perf_counter() - start
        return taken, [len(output.outputs[0].token_ids) for output in outputs]

    if arguments.prompts:
        # An answer ends at one of many tokens, drawn at random: geometric, and with the same mean.
        stops = random.Random(1).sample(range(100, config.vocab_size), config.vocab_size // MEAN_NEW_TOKENS)
        prompts = uneven_prompts(arguments.prompts, config.vocab_size)
        taken, lengths = seconds(prompts, 64, temperature=1.0, max_tokens=MOST_NEW_TOKENS, stop_token_ids=stops)
        say("answers", rows=arguments.max_num_seqs, seconds=taken, prompts=len(lengths), tokens=sum(lengths))
    num_prompt_tokens, fewer, most = arguments.lengths
    for rows in arguments.even_rows:
        for name in arguments.kinds:
            sampling = {"temperature": 1.0, "top_k": 50, "top_p": 0.7} | PARAMETERS[name]
            if not sampling.pop("do_sample", True):
                sampling = {"temperature": 0.0}
            prompts = even_prompts(rows, num_prompt_tokens)
            times = {
                number: seconds(prompts, warm_up, max_tokens=number, ignore_eos=True, **sampling)[0]
                for number, warm_up in ((most, rows), (fewer, 0))
            }
            step = (times[most] - times[fewer]) / (most - fewer)
            say("steps", rows=rows, parameters=name, step_ms=step * 1e3, token_ms=times[most] / most * 1e3)


def say(what: str, **figures: Any) -> None:
    print(json.dumps({"what": what} | figures), flush=True)


if __name__ == "__main__":
    main()
