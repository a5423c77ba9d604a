"""A program for `torchrun`: engines that two ranks hold together, then one each, in the same processes.

Usage: vllm_ranks.py FOLDER, where each rank writes what came of it, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import vllm_engines as engines

from verl_valgen.backends.base import Limits
from verl_valgen.backends.vllm import backend, versions
from verl_valgen.backends.vllm.answering import Growing
from verl_valgen.backends.vllm.backend import VLLMBackend
from verl_valgen.backends.vllm.engine import Engine
from verl_valgen.backends.vllm.making import EngineSize

CONFIG = engines.config(vocab_size=100)
SIZES = {"together": EngineSize(2, 100, 8, 2**24), "alone": EngineSize(1, 200, 4, 2**24)}


def gathered(weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor takes both ranks to have."""
    for name, tensor in weights:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        yield name, tensor


def answers(engine: Engine, **params: Any) -> list[list[int]]:
    requests = engines.requests(engines.prompts(100), **params)
    return [completion.output_ids for completion in VLLMBackend(engine, None, 0).generate(requests)]


def error_of(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except RuntimeError as e:
        return str(e)
    return ""


def use(engine: Engine) -> dict[str, Any]:
    by_seed = {}
    for seed in (1, 2):
        engine.load(gathered(engines.weights(engines.model(CONFIG, seed))))
        by_seed[seed] = answers(engine)
    sampled = answers(engine, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return {"greedy": by_seed, "sampled": sampled}


def stopped_together(engine: Engine, rank: int) -> list[tuple[int, str]]:
    """Answers that one rank alone has no time for."""
    deadline = time.time() + (1e6 if rank else -1)
    completions = VLLMBackend(engine, None, 0, Limits(deadline=deadline)).generate(
        engines.requests(engines.prompts(100))
    )
    return [(len(completion.output_ids), completion.finish_reason) for completion in completions]


class StopsTogether:
    """In the place of `StopStrings`: all answers have a stop string at the same place."""

    def __init__(self, tokenizer: Any) -> None:
        pass

    def stop(self, grown: Sequence[tuple[Growing, int]]) -> list[Growing]:
        stopped = [answer for answer, _ in grown if len(answer.output_ids) >= 5]
        for answer in stopped:
            answer.stop_at(5)
        return stopped


def free_blocks(engine: Engine) -> list[int]:
    """The free blocks of the cache in the order in which they will be taken, after answers that stopped together."""
    backend.StopStrings, real = StopsTogether, backend.StopStrings
    answers(engine, eos_token_id=[])
    backend.StopStrings = real
    pool = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


def faults(engine: Engine, rank: int) -> dict[str, str]:
    """What both ranks say where one does not get all weights."""
    found = {}
    load_weights = versions.load_weights

    def fail_on_one(llm: Any, weights: Iterator[Any]) -> Any:
        if rank == 1:
            next(weights)
            raise OSError("no room")
        return load_weights(llm, weights)

    def lose_on_one(llm: Any, weights: Iterator[Any]) -> Any:
        loaded = load_weights(llm, weights)
        if rank == 1:
            versions.model_of(llm).model.layers[0].self_attn.o_proj.weight.data.zero_()
        return loaded

    for name, replacement in {"failed": fail_on_one, "lost": lose_on_one}.items():
        versions.load_weights = replacement
        found[name] = error_of(engine.load, gathered(engines.weights(engines.model(CONFIG, 1))))
    versions.load_weights = load_weights
    engine.has_failed = False
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    environment = dict(os.environ)
    outcome: dict[str, Any] = {}
    for name, size in SIZES.items():
        engine = engines.engine(CONFIG, size)
        outcome[name] = use(engine)
        if name == "together":
            outcome["faults"] = faults(engine, rank)
            outcome["stopped"] = stopped_together(engine, rank)
            engine.load(gathered(engines.weights(engines.model(CONFIG, 1))))
            outcome["after faults"] = answers(engine)
            outcome["free blocks"] = free_blocks(engine)
        engine.close()
        total = torch.tensor(rank + 1)
        dist.all_reduce(total)  # the trainer's own group
        outcome[f"sum after {name}"] = int(total)
    outcome["environment is the same"] = dict(os.environ) == environment
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
