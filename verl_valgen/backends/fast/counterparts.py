"""Which of a model's modules look like those that have a fused counterpart: by their children, and by their code.

This module knows transformers' models; that the counterpart gives the same is proven elsewhere, in fused.py.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import nn

from verl_valgen.backends.fast.fused_attention import FusedAttention
from verl_valgen.backends.fast.modules import FusedMLP, FusedNorm

_TENSOR_NAMES = {"shape", "view", "reshape", "transpose", "contiguous", "torch"}
_ATTENTION_NAMES = _TENSOR_NAMES | {
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "head_dim", "scaling", "layer_idx", "config"),
    *("apply_rotary_pos_emb", "update", "_attn_implementation", "ALL_ATTENTION_FUNCTIONS", "get_interface"),
    *("eager_attention_forward", "nn", "functional", "dropout", "attention_dropout", "residual_dropout", "training"),
    *("sliding_window", "is_sliding", "use_rope", "force_rope", "use_qk_norm", "getattr", "Callable"),
    *("TransformersKwargs", "FlashAttentionKwargs", "eager_attention_forward"),
}
_MLP_NAMES = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_NORM_NAMES = {
    *("weight", "variance_epsilon", "eps", "dtype", "to", "torch", "float32", "float", "pow", "mean", "rsqrt"),
    *("_norm", "type_as"),
}
"""Names that a `forward` may use besides its local ones. With another, what a module computes could depend on the
position of a token, say, or on the size of numbers, which a proof on a few tokens does not see. (The flags among them
are constants of the module.)"""


def maker(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    """Returns what makes the fused counterpart of a module, None where it has none."""
    if type(module) in (FusedMLP, FusedAttention, FusedNorm, nn.RMSNorm):
        return None
    for fits, names, make in (
        (_is_rms_norm, _NORM_NAMES, FusedNorm),
        (_is_gated_mlp, _MLP_NAMES, FusedMLP),
        (_is_attention, _ATTENTION_NAMES, FusedAttention),
    ):
        if fits(module) and _is_plain(module) and _uses_only(names, module):
            return make
    return None


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's `forward` and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _uses_only(names: set[str], module: Any) -> bool:
    """Whether `forward`, and the methods that it calls of its own class, use no other names than these."""
    functions = [type(module).forward]
    if hasattr(type(module), "_norm"):
        functions.append(type(module)._norm)
    codes = [inspect.unwrap(function).__code__ for function in functions]
    while codes:
        code = codes.pop()
        if not names >= set(code.co_names):
            return False
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return True


def _is_rms_norm(module: nn.Module) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm")
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and not module._buffers
    )


def _is_gated_mlp(module: nn.Module) -> bool:
    children, projections = dict(module.named_children()), {"gate_proj", "up_proj", "down_proj"}
    return (
        projections <= children.keys() <= projections | {"act_fn"}
        and all(type(children[name]) is nn.Linear for name in projections)
        and hasattr(module, "act_fn")
    )


def _is_attention(module: Any) -> bool:
    children, projections = dict(module.named_children()), {"q_proj", "k_proj", "v_proj", "o_proj"}
    return (
        projections <= children.keys() <= projections | {"q_norm", "k_norm"}
        and all(type(children[name]) is nn.Linear for name in projections)
        and len({children[name].bias is None for name in ("q_proj", "k_proj", "v_proj")}) == 1
        and not module._parameters
        and _rotates(module)
        and all(hasattr(module, name) for name in ("config", "head_dim", "scaling", "layer_idx"))
        and module.config._attn_implementation == "sdpa"
    )


def _rotates(module: Any) -> bool:
    """Whether an attention rotates queries and keys: some models leave that out in some layers.

    Without it there is no counterpart, and in 16 bits the proof may not see the difference. Where the condition cannot
    be told from the module alone, it counts as left out.
    """
    conditions = _conditions_of_rotation(type(module).forward)
    try:
        return conditions is not None and all(eval(condition, {}, {"self": module}) for condition in conditions)
    except (AttributeError, NameError, TypeError):  # it asks for more than the module
        return False


@functools.cache
def _conditions_of_rotation(forward: Callable[..., Any]) -> tuple[CodeType, ...] | None:
    """The expressions on which a `forward` rotates, () where it always does; None where its source is not there."""
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except OSError:  # a class that was made in an interpreter
        return None
    return tuple(
        compile(ast.Expression(node.test), "condition of a rotation", "eval")
        for node in ast.walk(ast.parse(textwrap.dedent(source)))
        if isinstance(node, ast.If) and any("apply_rotary" in ast.unparse(inner) for inner in node.body)
    )
