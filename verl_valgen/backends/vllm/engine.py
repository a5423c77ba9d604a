"""vLLM's engine in this process: made once, given the weights of every round, asleep between rounds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from verl_valgen.backends.vllm import allocator, loading, making, versions
from verl_valgen.backends.vllm.making import EngineSize
from verl_valgen.backends.vllm.process import Compartment
from verl_valgen.collectives import clear_frames

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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
        self._is_distributed = dist.is_initialized()
        self._process = Compartment(making.environment(self.size, device), device, compile=compile)
        self._llm: Any = None
        self._freed_bytes: dict[str, int] = {}
        self._unreported: set[str] = set()
        """See `loading.load`."""
        self.num_calls = 0
        """Of those that it has answered, so that requests have names of their own."""
        if device.type == "cuda":
            torch.cuda.current_blas_handle()  # with a workspace that does not lie in one of vLLM's pools
        with self.in_force(), allocator.fit_for_pools(device):
            if device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                self._llm = making.make(config, model_class, self.size, dtype, device, compile=compile)
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
