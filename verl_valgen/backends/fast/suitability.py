"""Whether our loop suits a model or a request: what its configuration says, and what a trial shows."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from verl_valgen.backends.base import UnsuitableError
from verl_valgen.backends.batching import even_length
from verl_valgen.backends.fast import kernels
from verl_valgen.backends.fast.decoded import decoded_logits
from verl_valgen.backends.fast.fused import Proven, fuse, unfuse
from verl_valgen.backends.lengths import most_positions
from verl_valgen.backends.trial import (
    coarse_tolerance,
    difference,
    full_logits,
    model_key,
    same_kernels_tolerance,
    sequences_for_trial,
    tolerance,
)
from verl_valgen.collectives import attempt
from verl_valgen.settings.generation_config import SAMPLING_ONLY
from verl_valgen.text import describe

if TYPE_CHECKING:
    from verl_valgen.records import Request

logger = logging.getLogger(__name__)


class Finding(NamedTuple):
    """What a trial of a model has shown."""

    unsuitable: str | None
    """Why our loop does not suit it, None if it does."""
    proven: Proven = frozenset()
    """What may be fused."""


_FAR_AWAY = 1 << 20
"""A position where the context has no end."""

_findings: dict[tuple[str, bool], Finding] = {}
"""By `model_key` and whether fused modules were wanted. A round has a new copy of the same model."""


@torch.no_grad()
def try_model(model: PreTrainedModel, requests: Sequence[Request], *, may_fuse: bool) -> Finding:
    """Compares our loop's logits, on a few tokens of the requests, with those of the model's forward pass.

    There rows hold prompts of different lengths, one after another, and the steps are a CUDA graph where they will be
    one. This shows positions that are taken from the cache's length, masks of a shape that a model does not know,
    caches that it does not share, and what nobody has thought of. Done once per process for models of one class and
    configuration.

    Args:
        may_fuse: Whether fused modules are wanted. Afterwards those that are proven are in place.
    """
    key = (model_key(model), may_fuse)
    try:
        if key not in _findings:
            finding = _tried(model, requests, may_fuse)
            if finding is None:
                return Finding(None)
            _findings[key] = finding
        elif may_fuse and _findings[key].unsuitable is None:
            fuse(model, known=_findings[key].proven)
        return _findings[key]
    except torch.OutOfMemoryError as e:
        traceback.clear_frames(e.__traceback__)
        unfuse(model)
        return Finding("a trial ran out of memory")


def _tried(model: PreTrainedModel, requests: Sequence[Request], may_fuse: bool) -> Finding | None:
    """Returns what a trial shows, None for a model that has diverged, which tells nothing."""
    trial, error = attempt(lambda: _Trial(model, requests))
    if error is not None:
        return Finding(f"a forward pass without a cache failed: {_said(error)}")
    return trial.outcome(may_fuse) if trial.is_finite else None


class _Trial:
    """Sequences, and what the model says to the first two without a cache."""

    def __init__(self, model: PreTrainedModel, requests: Sequence[Request]) -> None:
        self.model = model
        long, short, other = sequences_for_trial(requests, even_length(model.config))
        self.sequences = [short, long, other]
        self.expected = torch.cat([full_logits(model, sequence) for sequence in (short, long)])
        self.is_finite = bool(self.expected.isfinite().all())

    def outcome(self, may_fuse: bool) -> Finding:
        """Tries what is wanted, then less, at last without kernels. What is proven is in place afterwards."""
        finding = self._outcome(may_fuse)
        if finding.unsuitable is None or not kernels.are_available(self.model.device):
            return finding
        try:
            with kernels.given_up(f"{type(self.model).__name__}: {finding.unsuitable}"):
                without = self._outcome(may_fuse)
                if without.unsuitable is not None:
                    raise UnsuitableError(without.unsuitable)  # then it is not for the kernels
        except UnsuitableError:
            return finding
        return without

    def _outcome(self, may_fuse: bool) -> Finding:
        if may_fuse:
            proven, error = attempt(lambda: fuse(self.model, lambda: decoded_logits(self.model, self.sequences)))
            reason = self._why_wrong(coarse_tolerance(self.model)) if error is None else _said(error)
            if reason is None:
                return Finding(None, proven)
            logger.debug("%s: nothing is fused: %s", type(self.model).__name__, reason)
            unfuse(self.model)
        return Finding(self._why_wrong(tolerance(self.model)))

    def _why_wrong(self, most: float) -> str | None:
        model = self.model
        logits, error = attempt(lambda: decoded_logits(model, self.sequences, capture=True))
        if error is not None:
            return _said(error)
        gap = difference(self.expected, logits, model.dtype)
        if not gap <= most:
            return f"its logits differ by {gap:.2g} from those without a cache"
        # Some take only from some position on what they do from the cache's length: a scale that grows, say.
        length = int(min(most_positions(model.config), _FAR_AWAY)) - 2
        farther, error = attempt(lambda: decoded_logits(model, self.sequences, reported_length=length))
        if error is not None or not difference(logits, farther, model.dtype) <= same_kernels_tolerance(model):
            return "it takes positions from the cache's length" if error is None else _said(error)
        return None


def _said(error: Exception) -> str:
    """Says why something failed, in one line.

    Raises:
        torch.OutOfMemoryError: That was why.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return str(error) if isinstance(error, UnsuitableError) else describe(error)


def why_unsuitable(model: PreTrainedModel, params: Any, cache_length: int) -> str | None:
    """Says why our loop cannot serve a model or a request's parameters, None if it can.

    Args:
        params: `transformers.GenerationConfig` fields.
        cache_length: The most tokens of a prompt and its answer.
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
