"""Chooses between our own decoding loop and Hugging Face's, for requests and models that ours cannot serve."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from verl_valgen.backends.base import UnsuitableError
from verl_valgen.backends.batching import Group
from verl_valgen.backends.hf import HFBackend
from verl_valgen.records import Completion, Request
from verl_valgen.settings.generation_config import SAMPLING_ONLY
from verl_valgen.text import describe

if TYPE_CHECKING:
    from verl_valgen.backends.fast.loop import DecodingLoop

logger = logging.getLogger(__name__)

_compile_failures: list[str] = []
"""Why torch.compile failed in this process. It is not tried again: it would fail every time, after half a minute."""


class FastBackend(HFBackend):
    """Generates with `DecodingLoop` where it can, on CUDA with one graph launch per token."""

    loop: DecodingLoop | None = None
    """Kept from one batch for the next."""
    is_fused = False
    """Whether the model's modules have been replaced by fused ones."""
    unsuitable: str | None = None
    """Why Hugging Face's loop runs instead, None where ours does."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        try:
            return super().generate(requests)
        finally:
            self.release()

    def prepare(self, requests: Sequence[Request], groups: Sequence[Group]) -> None:
        self.release()
        # The longest of all batches, so that one loop serves them; a multiple of 64, so that attention reads the mask
        # without a copy.
        longest = max(len(requests[group.indices[-1]].input_ids) + group.max_new_tokens for group in groups)
        self.cache_length = -(-longest // 64) * 64
        self.unsuitable = why_unsuitable(self.model, requests[groups[0].indices[0]].params, self.cache_length)
        may_fuse = self.limits.fuse and self.model.device.type == "cuda"
        if self.unsuitable is None and may_fuse and not self.is_fused:
            from verl_valgen.backends.fast.fused import fuse

            fuse(self.model)
            self.is_fused = True

    def release(self) -> None:
        self.loop = None

    def generate_batch(self, requests: Sequence[Request], max_new_tokens: int) -> list[Completion]:
        if self.unsuitable is None:
            try:
                return self._generate_batch_compiled(requests, max_new_tokens)
            except UnsuitableError as e:
                self.unsuitable = str(e)
            self.release()
        logger.debug("Hugging Face's loop: %s", self.unsuitable)
        return super().generate_batch(requests, max_new_tokens)

    def _generate_batch_compiled(self, requests: Sequence[Request], max_new_tokens: int) -> list[Completion]:
        """Returns the completions of one batch, generated with torch.compile if that is wanted and works."""
        try:
            return super().generate_batch(requests, max_new_tokens)
        except (UnsuitableError, torch.OutOfMemoryError):
            raise
        except Exception as e:
            if not self._compiles:
                raise
            _compile_failures.append(describe(e))
        logger.warning("generation.compile: going on without torch.compile, which failed: %s", _compile_failures[-1])
        self.release()
        return super().generate_batch(requests, max_new_tokens)

    @property
    def _compiles(self) -> bool:
        return self.limits.compile and not _compile_failures

    def call_generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        if self.unsuitable is not None:
            return super().call_generate(input_ids, **kwargs)
        from verl_valgen.backends.fast.loop import DecodingLoop

        if self.loop is None or self.loop.batch_size < len(input_ids):
            self.release()  # before the next one is allocated
            self.loop = DecodingLoop(self.model, len(input_ids), self.cache_length, compile=self._compiles)
        return super().call_generate(input_ids, custom_generate=self.loop, **kwargs)


def why_unsuitable(model: PreTrainedModel, params: Any, cache_length: int) -> str | None:
    """Says why our loop cannot serve a model or a request's parameters, None if it can.

    Args:
        params: `transformers.GenerationConfig` fields.
        cache_length: The most tokens of a padded prompt and its answer.
    """
    # 4.57 is the first that takes a callable as `custom_generate`, and has cache layers as they still are.
    if Version(transformers.__version__) < Version("4.57"):
        return f"transformers {transformers.__version__} lets no other loop in"
    handled_here = SAMPLING_ONLY | {"do_sample", "stop_strings"}
    config = GenerationConfig(**{name: value for name, value in params.items() if name not in handled_here})
    if (mode := config.get_generation_mode()) is not GenerationMode.GREEDY_SEARCH:
        return f"{mode.value} does not go one token after the other"
    for name, neutral in (
        ("use_cache", True), ("cache_implementation", None), ("prefill_chunk_size", None), ("guidance_scale", None),
    ):  # fmt: skip
        if params.get(name, neutral) not in (neutral, None):
            return f"generation.{name} is set"
    if model.config.is_encoder_decoder or not model._can_compile_fullgraph:
        return f"{type(model).__name__} has no steps of one shape"
    return _why_no_full_attention(model.config.get_text_config(), cache_length)


def _why_no_full_attention(config: Any, cache_length: int) -> str | None:
    """Says why not every layer attends to all of a sequence with a cache of its own, None if every layer does."""
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"the attention is {config._attn_implementation}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers share their keys and values"
    windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size", "full_attention": ""}
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:  # without them, an attribute that is set holds for all layers
        layer_types = [name for name, attribute in windows.items() if getattr(config, attribute or "_", None)]
    for layer_type in sorted(set(layer_types)):
        if layer_type not in windows:
            return f"the model has {layer_type}"
        window = getattr(config, windows[layer_type] or "_", None)
        if window is not None and window < cache_length:
            return f"the {layer_type} reaches back {window} tokens, the longest answer {cache_length}"
    return None
