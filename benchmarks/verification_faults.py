"""Faults as they were seen: each makes another model, or another loop, of a right copy."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn


class Fault(NamedTuple):
    kind: str
    what: str
    models: tuple[str, ...]
    plant: Callable[[Any, dict[str, Tensor]], object]
    """Called with a copy and the weights a training step earlier."""
    prepare: Callable[[Any], object] = lambda model: None
    """Called with the trainer's model."""
    around: Callable[[Any], contextlib.AbstractContextManager[object]] = lambda copy: contextlib.nullcontext()
    """Generation runs within this."""


def layers(model: Any) -> Any:
    return model.model.layers


def rotate_everywhere(model: Any, earlier: Any) -> None:
    for layer in layers(model):
        attention = layer.self_attn
        if hasattr(attention, "use_rope"):
            attention.use_rope = 1
        elif hasattr(attention, "is_sliding"):
            attention.sliding_window = None
        else:
            attention.sliding_window = attention.sliding_window or 2**20


def rotate_nothing(number: int) -> Callable[[Any, Any], None]:
    def still(module: nn.Module, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cos, sin = named["position_embeddings"]
        return arguments, named | {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    return lambda model, earlier: layers(model)[number].self_attn.register_forward_pre_hook(still, with_kwargs=True)


def redraw(part: str, deviation: float | None = None) -> Callable[[Any, Any], None]:
    def plant(model: Any, earlier: Any) -> None:
        torch.manual_seed(99)
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(torch.randn(parameter.shape) * (deviation or parameter.float().std().cpu()))

    return plant


def fill(part: str, value: float) -> Callable[[Any, Any], None]:
    def plant(model: Any, earlier: Any) -> None:
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.fill_(value)

    return plant


def before_forward(change: Callable[[dict[str, Any]], object]) -> Callable[[Any, Any], None]:
    def plant(model: Any, earlier: Any) -> None:
        original = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            change(kwargs)
            return original(*args, **kwargs)

        forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]  # transformers looks at it
        model.forward = forward

    return plant


def is_decoding(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("past_key_values") is not None and kwargs["past_key_values"].get_seq_length() > 0


def forget_positions(kwargs: dict[str, Any]) -> None:
    if is_decoding(kwargs):
        kwargs["position_ids"] = torch.zeros_like(kwargs["position_ids"])


def shift_positions(kwargs: dict[str, Any]) -> None:
    if is_decoding(kwargs):
        kwargs["position_ids"] = kwargs["position_ids"] + 4


def show_padding(kwargs: dict[str, Any]) -> None:
    kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])


@contextlib.contextmanager
def padding_in_states(model: Any) -> Iterator[None]:
    with mock.patch(f"{type(model).__module__}.apply_mask_to_padding_states", lambda states, mask: states):
        yield


def uncap(model: Any, earlier: Any) -> None:
    for layer in layers(model):
        layer.self_attn.attn_logit_softcapping = None


def adapt_head(size: float) -> Callable[[Any], None]:
    """The trainer's model has an adapter of rank 4 on its head, whose weight is the embedding's otherwise."""

    def prepare(model: Any) -> None:
        torch.manual_seed(4)
        weight = model.lm_head.weight
        delta = torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(weight + delta * size * weight.norm() / delta.norm(), requires_grad=False)

    return prepare


def tie(model: Any, earlier: Any) -> None:
    model.model.embed_tokens.weight = model.lm_head.weight


def stale(part: str) -> Callable[[Any, dict[str, Tensor]], None]:
    def plant(model: Any, earlier: dict[str, Tensor]) -> None:
        for name, values in model.state_dict().items():
            if part in name and name in earlier:
                values.copy_(earlier[name])

    return plant


def disturb(size: float) -> Callable[[Any, Any], None]:
    def plant(model: Any, earlier: Any) -> None:
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape).to(parameter) * parameter.float().std() * size)

    return plant


def leave_out(number: int) -> Callable[[Any, Any], None]:
    def plant(model: Any, earlier: Any) -> None:
        layers(model)[number].forward = lambda hidden_states, *args, **kwargs: hidden_states

    return plant


def nothing(model: Any, earlier: Any) -> None:
    """The way itself is wrong."""


FAULTS = (
    Fault("1", "rotary positions in layers without", ("smollm3", "exaone4", "cohere2"), rotate_everywhere),
    Fault("1", "none in one of four layers", ("llama", "qwen3"), rotate_nothing(1)),
    Fault("3", "vectors redrawn", ("diffllama",), redraw("lambda_", 0.1)),
    Fault("3", "a query projection redrawn", ("qwen2",), redraw("layers.1.self_attn.q_proj.weight")),
    Fault("3", "a down projection redrawn", ("qwen2",), redraw("layers.1.mlp.down_proj.weight")),
    Fault("3", "a router redrawn", ("qwen3_moe",), redraw("layers.1.mlp.gate.weight")),
    Fault("3", "norms of queries and keys at 3", ("qwen3",), fill("k_norm", 3.0)),
    Fault("8", "answers at position 0", ("gpt2", "opt", "llama"), before_forward(forget_positions)),
    Fault("8", "answers 4 positions further", ("gpt2", "llama"), before_forward(shift_positions)),
    Fault("9", "padding attended to", ("llama", "gpt2", "mixtral"), before_forward(show_padding)),
    Fault("9", "padding in recurrent states", ("falcon_h1", "lfm2", "mamba2", "qwen3_next"), nothing,
          around=padding_in_states),
    Fault("9", "padding that no mask hides", ("rwkv",), nothing),
    Fault("10", "the batch's rotary table", ("phi3, longrope",), nothing),
    Fault("11", "soft-cap of 1 dropped", ("gemma2, cap 1",), uncap),
    Fault("11", "soft-cap of 5 dropped", ("gemma2, cap 5",), uncap),
    Fault("11", "soft-cap of 50 dropped", ("gemma2, cap 50",), uncap),
    Fault("12", "head's adapter (norm 1) in the embedding", ("qwen2, tied",), tie, adapt_head(1.0)),
    Fault("12", "head's adapter (norm 0.3) in the embedding", ("qwen2, tied",), tie, adapt_head(0.3)),
    Fault("12", "head's adapter (norm 0.1) in the embedding", ("qwen2, tied",), tie, adapt_head(0.1)),
    Fault("-", "a layer left out", ("llama", "mixtral"), leave_out(1)),
    Fault("-", "weights +- 10 %", ("llama", "mixtral"), disturb(0.1)),
    Fault("-", "weights +- 3 %", ("llama",), disturb(0.03)),
    Fault("-", "weights of the step before", ("llama",), stale("")),
    Fault("-", "a layer of the step before", ("llama",), stale("layers.1.")),
)  # fmt: skip
"""By the kinds of docs/verification.md."""

ALWAYS_WRONG = ("rwkv", "phi3, longrope")
"""Models whose padded answers are wrong without a planted fault."""
