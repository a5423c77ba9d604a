"""vLLM's engine in this process: made once, given the weights of every round, asleep between rounds.

(Over 200 lines, as a good part of it is what an engine is made with.)
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from verl_valgen.backends.lengths import most_positions
from verl_valgen.backends.vllm import allocator, loading, versions
from verl_valgen.backends.vllm.process import Compartment
from verl_valgen.collectives import clear_frames

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LENGTH_MULTIPLE = 64
_MOST_PROMPT_TOKENS = 8192
"""Read in one step."""
_SMALLEST_SHARE = 0.01
"""Of the device's memory, which vLLM compares with what is free before it makes anything. What it takes is said in
bytes."""


@dataclass(frozen=True)
class EngineSize:
    """What an engine is made for."""

    tensor_parallel: int
    """Number of ranks that hold the model together."""
    max_model_len: int
    """Tokens of the longest prompt with its answer."""
    max_num_seqs: int
    """Number of sequences that run at once."""
    cache_bytes: int
    """Of keys and values, on each rank's device."""

    def rounded(self, config: PretrainedConfig) -> EngineSize:
        """With room for a multiple of 64 tokens, as far as the model's context reaches."""
        length = math.ceil(self.max_model_len / _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        length = int(min(length, most_positions(config)))
        return EngineSize(self.tensor_parallel, length, self.max_num_seqs, self.cache_bytes)


class Engine:
    """vLLM's engine, with random weights until `load`.

    Making one is collective over all ranks of torch.distributed, where it is initialised: contiguous groups of
    `size.tensor_parallel` ranks hold a model each. Only one at a time in a process.

    Args:
        config: Of the model; nothing is read from where it came from.
        model_class: The class in transformers, by whose name vLLM finds its own.
        size: What it is made for; see `EngineSize.rounded`.
        dtype: Of weights and computation.
        compile: Whether torch.compile may be used: that takes half a minute. CUDA graphs are, in any case.

    Raises:
        Exception: Whatever vLLM raises; the process can go on, and make another one.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        model_class: type,
        size: EngineSize,
        dtype: torch.dtype,
        device: torch.device,
        *,
        compile: bool,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.size = size.rounded(config)
        self.generation_config = GenerationConfig()
        """Set by who answers: its `eos_token_id` ends answers."""
        self.has_failed = False
        """Whether it raised where that ended more than one request: it is of no use then, but to be closed."""
        self._is_distributed = dist.is_available() and dist.is_initialized()
        self._process = Compartment(_environment(self.size, device), device, compile=compile)
        self._llm: Any = None
        self._freed_bytes: dict[str, int] = {}
        self._unreported: set[str] = set()
        """See `loading.load`."""
        self.num_calls = 0
        """Of those that it has answered, so that requests have names of their own."""
        with self.in_force(), allocator.fit_for_pools(device):
            if device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                self._llm = self._make(model_class, compile)
                if (num_tokens := versions.cache_tokens(self._llm)) < self.size.max_model_len:
                    # vLLM would wait for ever for room that never comes.
                    raise RuntimeError(f"the cache has room for {num_tokens} tokens of {self.size.max_model_len}")
            except BaseException as e:
                clear_frames(e)  # they hold what there is of the engine
                self._free()
                raise

    def in_force(self) -> AbstractContextManager[None]:
        """The process as vLLM wants it, while open."""
        return self._process.entered()

    @property
    def llm_engine(self) -> Any:
        """vLLM's `LLMEngine`. To be used in force."""
        return self._llm.llm_engine

    def serves(self, size: EngineSize) -> bool:
        """Whether requests of this size can be answered without making another engine.

        A cache of another size does, and somewhat fewer sequences at once: the others wait.
        """
        wanted = size.rounded(self.config)
        return (
            self._llm is not None
            and not self.has_failed
            and wanted.tensor_parallel == self.size.tensor_parallel
            and wanted.max_model_len <= self.size.max_model_len
            and wanted.max_num_seqs <= 2 * self.size.max_num_seqs
        )

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Wakes the engine and gives it all weights of the model. Collective over the ranks that hold it together.

        Args:
            weights: See `loading.load`, which says what is raised, too. After an error it has failed.
        """
        with self.in_force(), self.failing_for_good():
            loading.load(self._llm, weights, self._unreported, prepare=lambda: self._wake("weights"))
            self._wake("kv_cache")
            # Keys and values of equal prompts under earlier weights would be taken for theirs.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not forget the keys and values of earlier weights")

    @contextmanager
    def failing_for_good(self) -> Iterator[None]:
        """Notes that the engine has failed, if anything is raised while open."""
        try:
            yield
        except BaseException:
            self.has_failed = True
            raise

    def sleep(self) -> None:
        """Gives up the memory of weights and cache, on CUDA. What they hold is lost."""
        if self.device.type != "cuda" or self._llm is None or self._freed_bytes:
            return
        with self.in_force(), self.failing_for_good():
            free = torch.cuda.mem_get_info(self.device)[0]
            self._freed_bytes = {"weights": 0, "kv_cache": self.size.cache_bytes}
            self._llm.sleep(level=2)
            freed = max(0, torch.cuda.mem_get_info(self.device)[0] - free)
            self._freed_bytes = {"weights": max(0, freed - self.size.cache_bytes), "kv_cache": self.size.cache_bytes}

    def _wake(self, tag: str) -> None:
        if tag in self._freed_bytes:
            allocator.make_room(self._freed_bytes[tag], self.device)
            self._llm.wake_up(tags=[tag])
            del self._freed_bytes[tag]

    def close(self) -> None:
        """Frees all that vLLM has here, so that another engine can be made. Collective as making one is."""
        if self._llm is not None:
            with self.in_force():
                try:
                    for tag in list(self._freed_bytes):  # memory that is asleep cannot be freed
                        self._wake(tag)
                finally:
                    self._free()

    def _make(self, model_class: type, compile: bool) -> Any:
        from vllm import LLM

        on_cuda = self.device.type == "cuda"
        size = self.size
        num_read = max(size.max_num_seqs, min(_MOST_PROMPT_TOKENS, size.max_num_seqs * size.max_model_len))
        arguments: dict[str, Any] = {}
        if self._is_distributed:
            arguments |= {"distributed_executor_backend": "external_launcher"}
        if on_cuda:
            arguments |= {"enable_sleep_mode": True, "compilation_config": _compilation(size.max_num_seqs, compile)}
        else:
            # Where a step reads part of a prompt, the noise of a seeded answer is taken back: not by CPU's generators.
            arguments |= {"enable_chunked_prefill": False}
            num_read = max(num_read, size.max_model_len)
        with (
            tempfile.TemporaryDirectory(prefix="verl-valgen-") as folder,
            versions.plain_cpu(),
            versions.without_bars(),
        ):
            self._write_config(Path(folder), model_class)
            return LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=str(self.dtype).removeprefix("torch."),
                seed=0,
                tensor_parallel_size=size.tensor_parallel,
                max_model_len=size.max_model_len,
                max_num_seqs=size.max_num_seqs,
                max_num_batched_tokens=num_read,
                kv_cache_memory_bytes=size.cache_bytes,
                gpu_memory_utilization=_SMALLEST_SHARE,
                enable_prefix_caching=True,
                logprobs_mode="raw_logprobs",
                enforce_eager=not on_cuda,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **arguments,
            )

    def _write_config(self, folder: Path, model_class: type) -> None:
        """All that vLLM reads of a model here."""
        config = copy.deepcopy(self.config)
        config.architectures = [model_class.__name__]
        values = json.loads(config.to_json_string(use_diff=True))
        # vLLM has a configuration of its own where the model's comes with code: that is not run again.
        values.pop("auto_map", None)
        values.pop("torch_dtype", None)
        values["dtype"] = str(self.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(values))

    def _free(self) -> None:
        llm, self._llm = self._llm, None
        self._freed_bytes = {}
        if llm is not None:
            versions.shut_down(llm)
        del llm
        gc.unfreeze()
        gc.collect()
        versions.destroy_groups(owns_world=not self._is_distributed)
        gc.collect()
        versions.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _compilation(max_num_seqs: int, compile: bool) -> dict[str, Any]:
    """CUDA graphs for up to so many sequences, in steps that grow: each keeps memory, and takes time when it is made.

    Without torch.compile only whole steps can be captured. Of those that read prompts vLLM could have graphs, too (the
    mode `FULL`), and then answers wrongly: after the first token with 0.25 on H100, where its older model runner runs,
    which mixtures of experts have; torchtitan met the same (pytorch/torchtitan#3709). There are few of these steps, as
    `VLLMBackend` hands prompts on in groups.
    """
    steps = [(8, 8), (64, 8), (256, 16), (max_num_seqs, 64)]
    sizes, last = [1, 2, 4], 0
    for end, step in steps:
        sizes += range(last + step, end + 1, step)
        last = max(last, end)
    sizes = sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})
    chosen: dict[str, Any] = {"cudagraph_capture_sizes": sizes, "max_cudagraph_capture_size": max_num_seqs}
    return chosen if compile else chosen | {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


def _environment(size: EngineSize, device: torch.device) -> dict[str, str]:
    """The variables with which vLLM runs here, but for what the process has set on purpose."""
    required = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # there is nothing to be fetched
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    preferred = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}  # memory that does not sleep
    if find_spec("flashinfer") is None:
        preferred["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if int(os.environ.get("LOCAL_WORLD_SIZE", size.tensor_parallel)) % size.tensor_parallel == 0:
        preferred["VLLM_HOST_IP"] = "127.0.0.1"  # who holds a model together is on one host
    if dist.is_available() and dist.is_initialized():
        rank = dist.get_rank()
        local_rank = device.index if device.type == "cuda" else os.environ.get("LOCAL_RANK", rank)
        required |= {"RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size()), "LOCAL_RANK": str(local_rank)}
        preferred |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # not used: there is a group already
    return {name: value for name, value in preferred.items() if name not in os.environ} | required
