"""Measures rounds that vLLM answers inside the trainer's processes, beside `fast`, the sharded model and vLLM alone.

    torchrun --standalone --nproc-per-node=2 benchmarks/vllm_engine.py --size 7.6B --lengths /tmp/lengths.json
    torchrun --standalone --nproc-per-node=2 benchmarks/vllm_engine.py --size 7.6B --lengths /tmp/lengths.json --alone

The first call has an FSDP2 model with random weights in float32 and answers whole rounds, check included: 8 prompts of
128 tokens with 128 new tokens each, greedy; then answers whose number of tokens is geometric (see throughput.py). The
ranks hold the model together. Before and after a round the engine sleeps. "Alone" is vLLM by itself on the same ranks,
as it is by default (torch.compile and CUDA graphs, `LLM.generate`), with as many tokens for each prompt as the first
call had.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from rounds import BenchmarkHost, say, sharded, start, synchronize, world_size
from throughput import make_requests
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

NUM_PROMPTS, NUM_TOKENS = 8, 128
WAYS: dict[str, dict[str, Any]] = {
    "vllm": {"backend": "vllm"},
    "fast": {"backend": "fast"},
    "sharded": {"backend": "hf", "gather": "sharded"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--prompts", type=int, default=1024, help="of the answers of uneven length; 0: none")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="generation.compile")
    parser.add_argument("--lengths", type=Path, default=Path("/tmp/lengths.json"))
    parser.add_argument("--alone", action="store_true")
    arguments = parser.parse_args()
    device = start()
    logging.getLogger("verl_valgen").setLevel(logging.WARNING)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    say(f"{world_size()} x {name}; {versions}; {arguments.size}")
    if arguments.alone:
        measure_alone(arguments, device)
    else:
        measure_rounds(arguments, device)
    dist.destroy_process_group()


def measure_rounds(arguments: argparse.Namespace, device: torch.device) -> None:
    from omegaconf import OmegaConf

    from verl_valgen.rounds.proven import ProvenAnswerer
    from verl_valgen.rounds.restore import preserved_random_state
    from verl_valgen.settings.load import GenerationSettings

    model = random_model(config_of(arguments.size, tie_word_embeddings=False), device, torch.float32)
    end_after_a_geometric_number_of_tokens(model, MEAN_NEW_TOKENS)
    host = BenchmarkHost(sharded(model, "fsdp2", device), OmegaConf.create({}), device)
    del model
    parts = measured_parts(device)
    lengths: dict[str, list[int]] = {}
    ends: list[transformers.GenerationConfig] = []
    with torch.no_grad():  # as training has: communicators, and what cuBLAS keeps
        host.model(torch.zeros(1, NUM_TOKENS, dtype=torch.int64, device=device))
    used_before = used_gib(device)

    def say_used(name: str) -> None:
        say(f"{name}: {used_gib(device) - used_before:.2f} GiB more in use on the device than before the first round")

    for way in arguments.ways:
        tensor_parallel = {"tensor_parallel": world_size()} if way == "vllm" else {}
        settings = GenerationSettings(
            enabled=True, console="none", compile=arguments.compile, **WAYS[way], **tensor_parallel
        )
        answerer = ProvenAnswerer(host, settings, lambda: ends[-1])

        def answer(requests: list[Any]) -> Any:
            with preserved_random_state(device):
                return answerer(requests if host.is_logging_rank else None)  # noqa: B023

        ends.append(transformers.GenerationConfig(pad_token_id=0))
        even = make_requests(even_prompts(NUM_PROMPTS, NUM_TOKENS), max_new_tokens=NUM_TOKENS, **PARAMETERS["greedy"])
        rounds = [measured(lambda: answer(even), parts, device) for _ in range(1 + arguments.repetitions)]  # noqa: B023
        show(f"{way}, {NUM_PROMPTS} x {NUM_TOKENS}, first", rounds[:1])
        show(f"{way}, {NUM_PROMPTS} x {NUM_TOKENS}", rounds[1:])
        say_used(f"{way}, {NUM_PROMPTS} x {NUM_TOKENS}")
        if arguments.prompts and way != "sharded":
            ends.append(transformers.GenerationConfig(pad_token_id=0, eos_token_id=EOS_ID))
            prompts = uneven_prompts(arguments.prompts, SIZES[arguments.size]["vocab_size"])
            uneven = make_requests(prompts, max_new_tokens=MOST_NEW_TOKENS, **PARAMETERS["temperature"])
            rounds = [measured(lambda: answer(uneven), parts, device) for _ in range(2)]  # noqa: B023
            show(f"{way}, {arguments.prompts} uneven, first", rounds[:1])
            show(f"{way}, {arguments.prompts} uneven", rounds[1:])
            if way == "vllm" and host.is_logging_rank:
                lengths["uneven"] = [len(completion.output_ids) for completion in rounds[1]["answers"].completions]
            say_used(f"{way}, {arguments.prompts} uneven")
        answerer.answerer.close_loaders([])
        say_used(f"{way}, closed")
    if lengths:
        arguments.lengths.write_text(json.dumps(lengths))


def measured_parts(device: torch.device) -> dict[str, float]:
    """Seconds by part of a round, added up by the engine's functions themselves, which are wrapped."""
    from verl_valgen.backends.fast.backend import FastBackend
    from verl_valgen.backends.vllm.backend import VLLMBackend
    from verl_valgen.backends.vllm.engine import Engine

    parts: dict[str, float] = defaultdict(float)

    def wrap(owner: type, name: str, part: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(device)
                parts[part] += time.perf_counter() - begin

        setattr(owner, name, wrapped)

    for owner, name, part in (
        (Engine, "__init__", "make"),
        (Engine, "load", "wake, gather and load"),
        (Engine, "sleep", "sleep"),
        (VLLMBackend, "generate", "answer"),
        (FastBackend, "generate", "answer"),
    ):
        wrap(owner, name, part)
    return parts


def measured(call: Callable[[], Any], parts: dict[str, float], device: torch.device) -> dict[str, Any]:
    """Seconds of a call in all and by part, on this rank. Collective: all ranks must call."""
    parts.clear()
    dist.barrier()
    synchronize(device)
    begin = time.perf_counter()
    answers = call()
    synchronize(device)
    return {"seconds": time.perf_counter() - begin, "parts": dict(parts), "answers": answers}


def show(name: str, rounds: list[dict[str, Any]]) -> None:
    answers = rounds[-1]["answers"]
    if answers is None:
        return
    num_tokens = sum(len(completion.output_ids) for completion in answers.completions)
    parts = {part: statistics.median(one["parts"].get(part, 0.0) for one in rounds) for part in rounds[-1]["parts"]}
    listed = ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())
    all_s = statistics.median(one["seconds"] for one in rounds)
    say(f"{name}: {all_s:.2f} s ({listed or 'no parts'}); {num_tokens} tokens, verified: {answers.verified}")


def used_gib(device: torch.device) -> float:
    """What everybody has of the device, without what torch has cached."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30


def measure_alone(arguments: argparse.Namespace, device: torch.device) -> None:
    """vLLM by itself, in this process and with these ranks, with random weights."""
    import os
    import tempfile

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    config = config_of(arguments.size, tie_word_embeddings=False)
    config.architectures = ["Qwen2ForCausalLM"]
    folder = tempfile.mkdtemp()
    config.save_pretrained(folder)
    begin = time.perf_counter()
    llm = LLM(
        model=folder,
        load_format="dummy",
        dtype="bfloat16" if device.type == "cuda" else "float32",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=256,
        gpu_memory_utilization=0.6,
        distributed_executor_backend="external_launcher",
        tensor_parallel_size=world_size(),
        disable_log_stats=True,
        seed=0,
        **({} if device.type == "cuda" else {"kv_cache_memory_bytes": 2**28, "enforce_eager": True}),
    )
    say(f"vLLM alone: made in {time.perf_counter() - begin:.1f} s")
    greedy = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "detokenize": False}
    work: dict[str, Any] = {
        f"8 x 128{name}": (
            even_prompts(NUM_PROMPTS, NUM_TOKENS),
            [SamplingParams(**greedy, logprobs=logprobs)] * NUM_PROMPTS,
        )
        for name, logprobs in (("", None), (", with log-probabilities", 0))
    }
    if arguments.prompts and arguments.lengths.exists():
        lengths = json.loads(arguments.lengths.read_text())["uneven"]
        work[f"{len(lengths)} uneven"] = (
            uneven_prompts(len(lengths), SIZES[arguments.size]["vocab_size"]),
            [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths],
        )
    for name, (prompts, params) in work.items():
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        llm.generate(inputs[:64], params[:64], use_tqdm=False)  # warms up
        taken = []
        for _ in range(arguments.repetitions if len(prompts) < 100 else 1):
            llm.reset_prefix_cache()
            dist.barrier()
            begin = time.perf_counter()
            outputs = llm.generate(inputs, params, use_tqdm=False)
            taken.append(time.perf_counter() - begin)
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        say(f"vLLM alone, {name}: {statistics.median(taken):.2f} s, {num_tokens} tokens")


if __name__ == "__main__":
    main()
