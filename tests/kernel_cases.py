"""What each Triton kernel must give: what torch's operations do. The same for Triton's interpreter and for a GPU.

`unit/backends/test_kernels.py` runs these cases on CPU in a process of its own, as the interpreter must be chosen
before Triton is imported; `gpu/test_kernels_on_cuda.py` runs them on a GPU. The interpreter takes bfloat16 for integers
in matrix products, and cuts numbers off instead of rounding them to bfloat16.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from verl_valgen.backends.fast import attention as fast_attention
from verl_valgen.backends.fast.decoded import decoded_logits
from verl_valgen.backends.fast.fused import fuse, unfuse
from verl_valgen.backends.fast.kernels import activation, attention, norm, rotary
from verl_valgen.backends.fast.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from verl_valgen.backends.fast.kernels.attention import decode_attention
from verl_valgen.backends.fast.kernels.norm import rms_norm
from verl_valgen.backends.fast.kernels.rotary import rotate_and_store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# By the interpreter it takes long, and multiplies in one way whatever the dtype.
with_attention_in_every_dtype = pytest.mark.parametrize("dtype", DTYPES if len(DTYPES) > 2 else DTYPES[:1], ids=str)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, *, units: int = 4) -> bool:
    """Up to so many units in the last place of numbers about 1; of float32, in which sums are taken, some more."""
    tolerance = max(units * torch.finfo(dtype).eps, 1e-5)
    return bool(((actual.float() - expected.float()).abs() <= tolerance).all())


# --- attention


def expected_attention(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, scaling: float) -> Tensor:
    """Row by row, torch's own in float64."""
    num_groups = query.shape[1] // keys.shape[1]
    rows = [
        F.scaled_dot_product_attention(
            query[row, :, None].double(),
            keys[row, :, : slot + 1].double().repeat_interleave(num_groups, 0),
            values[row, :, : slot + 1].double().repeat_interleave(num_groups, 0),
            scale=scaling,
        )[:, 0]
        for row, slot in enumerate(slots.tolist())
    ]
    return torch.stack(rows)


def attention_inputs(
    dtype: torch.dtype, slots: list[int], num_heads: int = 6, num_kv_heads: int = 2, head_dim: int = 64,
    value_dim: int | None = None, cache_length: int = 200,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """A query, the first rows of a larger cache with NaN in every slot that a row does not hold, and the slots."""
    num_rows = len(slots)
    query = random(num_rows, num_heads, head_dim, dtype=dtype)
    keys = random(num_rows + 2, num_kv_heads, cache_length, head_dim, dtype=dtype)
    values = random(num_rows + 2, num_kv_heads, cache_length, value_dim or head_dim, dtype=dtype)
    for row in range(num_rows + 2):
        first_unused = slots[row] + 1 if row < num_rows else 0
        keys[row, :, first_unused:] = values[row, :, first_unused:] = torch.nan
    return query, keys[:num_rows], values[:num_rows], torch.tensor(slots, device=DEVICE)


@with_attention_in_every_dtype
@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (80, 80), (96, 48), (128, 128), (256, 256), (24, 24)])
def test_attention_for_each_head_dim(dtype, head_dim, value_dim, num_splits):
    inputs = attention_inputs(dtype, [0, 77, 199], head_dim=head_dim, value_dim=value_dim)
    output = decode_attention(*inputs, head_dim**-0.5, num_splits)
    assert output.dtype == dtype
    assert output.is_contiguous()
    assert close(output, expected_attention(*inputs, head_dim**-0.5), dtype)


@with_attention_in_every_dtype
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (3, 1), (28, 4), (40, 2)])
def test_attention_for_each_group_size(dtype, num_heads, num_kv_heads):
    inputs = attention_inputs(dtype, [5, 130], num_heads, num_kv_heads)
    assert close(decode_attention(*inputs, 0.3), expected_attention(*inputs, 0.3), dtype)


@pytest.mark.parametrize("num_splits", [1, 2, 5, 7])
def test_attention_at_the_edges_of_blocks_and_parts(num_splits):
    slots = [0, 1, 31, 32, 62, 63, 64, 65, 95, 96, 127, 128, 129, 191, 192, 199]
    inputs = attention_inputs(torch.float16, slots, 2, 1, 16)
    assert close(decode_attention(*inputs, 0.25, num_splits), expected_attention(*inputs, 0.25), torch.float16)


def test_attention_to_a_cache_that_lies_in_another_order():
    query, keys, values, slots = attention_inputs(torch.float32, [3, 150])
    keys, values = (states.transpose(1, 2).contiguous().transpose(1, 2) for states in (keys, values))
    spread = torch.stack([query, query], dim=1)[:, 0]  # rows lie apart
    assert not keys.is_contiguous()
    assert not spread.is_contiguous()
    assert torch.equal(
        decode_attention(spread, keys, values, slots, 0.1), decode_attention(query, keys, values, slots, 0.1)
    )


@with_attention_in_every_dtype
@pytest.mark.parametrize("num_splits", [1, 3])
def test_attention_of_a_row_does_not_depend_on_the_others(dtype, num_splits):
    query, keys, values, slots = attention_inputs(dtype, [150, 3, 199, 64], 2, 1)
    expected = decode_attention(query, keys, values, slots, 0.1, num_splits)
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    moved = decode_attention(query[order], keys[order], values[order], slots[order], 0.1, num_splits)
    assert torch.equal(moved, expected[order])
    keys, values = keys.clone(), values.clone()
    query[[0, 2]] = keys[[0, 2]] = values[[0, 2]] = torch.nan
    output = decode_attention(query, keys, values, slots, 0.1, num_splits)
    assert output[[0, 2]].isnan().all()
    assert torch.equal(output[[1, 3]], expected[[1, 3]])


def test_nan_that_a_row_holds_is_seen():
    query, keys, values, slots = attention_inputs(torch.float32, [150, 70])
    keys[0, :, 100] = torch.nan
    output = decode_attention(query, keys, values, slots, 0.1, 3)
    assert output[0].isnan().all()
    assert output[1].isfinite().all()


def test_attention_of_a_slot_behind_the_cache_is_that_of_the_last():
    query, keys, values, slots = attention_inputs(torch.float32, [199, 199])
    expected = decode_attention(query, keys, values, slots, 0.1)
    assert torch.equal(decode_attention(query, keys, values, slots + 100, 0.1), expected)


# --- rotation


def expected_rotation(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Llama's in transformers: (B, heads, D), by torch's operations."""
    turning, resting = heads.split([cos.shape[1], heads.shape[2] - cos.shape[1]], dim=-1)
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([turned, resting], dim=-1)


@in_every_dtype
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("head_dim", "size"), [(64, 64), (80, 32), (96, 96), (128, 128), (256, 64), (24, 24)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (7, 1)])
def test_rotation(dtype, head_dim, size, num_heads, num_kv_heads, has_norms):
    slots = torch.tensor([0, 19, 7], device=DEVICE)
    rows = torch.arange(3, device=DEVICE)
    states = random(3, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    cos, sin = random(2, 3, size, dtype=dtype)
    keys, values = torch.full((2, 4, num_kv_heads, 20, head_dim), torch.nan, device=DEVICE, dtype=dtype)[:, :3]
    weights = tuple(random(2, head_dim, dtype=dtype)) if has_norms else None
    queries = rotate_and_store(states, cos, sin, keys, values, slots, num_heads, weights, 1e-6)

    heads = states.unflatten(1, (-1, head_dim))
    query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if weights is not None:
        query, key = (
            F.rms_norm(part.float(), (head_dim,), weight.float(), 1e-6).to(dtype)
            for part, weight in zip((query, key), weights, strict=True)
        )
    written = keys[rows, :, slots], values[rows, :, slots]
    expected = expected_rotation(query, cos, sin), expected_rotation(key, cos, sin)
    if has_norms:  # the sum of squares is taken in another order
        assert close(queries, expected[0], dtype, units=16)
        assert close(written[0], expected[1], dtype, units=16)
    else:
        assert torch.equal(queries, expected[0])
        assert torch.equal(written[0], expected[1])
    assert torch.equal(written[1], value)
    for states in (keys, values):  # and nothing else was written
        states[rows, :, slots] = torch.nan
        assert states.isnan().all()


def test_rotation_by_a_table_that_rows_share():
    states, keys, values = random(3, 4 * 64, dtype=torch.float32), *random(2, 3, 1, 8, 64, dtype=torch.float32)
    cos, sin = random(2, 1, 64, dtype=torch.float32).expand(-1, 3, -1)
    queries = rotate_and_store(states, cos, sin, keys, values, torch.tensor([1, 2, 3], device=DEVICE), 2)
    assert torch.equal(queries, expected_rotation(states.unflatten(1, (-1, 64))[:, :2], cos, sin))


@pytest.mark.parametrize("slot", [-1, 8, 1 << 40])
def test_nothing_is_written_outside_the_cache(slot):
    states, keys, values = random(1, 4 * 64, dtype=torch.float32), *random(2, 3, 1, 8, 64, dtype=torch.float32)
    before = keys.clone(), values.clone()
    cos, sin = random(2, 1, 64, dtype=torch.float32)
    rotate_and_store(states, cos, sin, keys[1:2], values[1:2], torch.tensor([slot], device=DEVICE), 2)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


# --- activation


@in_every_dtype
@pytest.mark.parametrize("shape", [(1, 2), (3, 1000), (2, 4098)])
def test_activations(dtype, shape):
    gate_up = 3 * random(*shape, dtype=dtype)
    gate_up[0, 0] = -200.0  # its exponential is not finite
    gate, up = gate_up.chunk(2, dim=1)
    for kernel, activated in (
        (silu_and_mul, F.silu(gate)),
        (gelu_tanh_and_mul, F.gelu(gate, approximate="tanh")),
    ):
        output = kernel(gate_up)
        assert output.dtype == dtype
        assert close(output, activated * up, dtype, units=16 * 4)
        if kernel is silu_and_mul and dtype is not torch.float32:  # the exponential's errors vanish in the rounding
            assert (output != activated * up).float().mean() < 0.01


# --- norm


@in_every_dtype
@pytest.mark.parametrize("shape", [(1, 64), (3, 896), (2, 3584), (5, 5000)])
def test_rms_norm(dtype, shape):
    states, weight = 3 * random(*shape, dtype=dtype), random(shape[1], dtype=dtype)
    states[0] = 0
    expected = F.rms_norm(states.float(), shape[1:], weight.float(), 1e-6).to(dtype)
    assert close(rms_norm(states, weight, 1e-6), expected, dtype, units=8)


# --- the modules that use them


def tiny(name: str, **fields: object) -> PreTrainedModel:
    shape = {
        "vocab_size": 200, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**shape, **fields)).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms of other weights than 1, and biases
            parameter += 0.1 * torch.randn_like(parameter)
    return model


SEQUENCES = [[*range(3, 10)], [*range(1, 14)], [*range(20, 33)]]


@pytest.fixture
def seen(monkeypatch) -> dict[str, int]:
    """How often each kernel is called."""
    numbers: dict[str, int] = {}

    def counted(name, kernel):
        def call(*args, **kwargs):
            numbers[name] = numbers.get(name, 0) + 1
            return kernel(*args, **kwargs)

        return call

    for module, name in ((attention, "decode_attention"), (rotary, "rotate_and_store"), (norm, "rms_norm"),
                         (activation, "silu_and_mul"), (activation, "gelu_tanh_and_mul")):  # fmt: skip
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return numbers


@pytest.mark.parametrize(
    ("name", "fields", "kernels"),
    [
        ("Qwen2Config", {}, {"rotate_and_store", "decode_attention", "silu_and_mul", "rms_norm"}),
        ("Qwen3Config", {"head_dim": 32}, {"rotate_and_store", "decode_attention", "silu_and_mul", "rms_norm"}),
        ("GemmaConfig", {"head_dim": 16}, {"rotate_and_store", "decode_attention", "gelu_tanh_and_mul"}),
    ],
)
def test_modules_are_proven_with_their_kernels(name, fields, kernels, seen):
    model = tiny(name, **fields)
    expected = decoded_logits(model, SEQUENCES)
    seen.clear()  # the loop's own attention of a step is a kernel too, where there is a GPU
    proven = fuse(model)
    assert proven
    assert kernels <= seen.keys()
    seen.clear()
    logits = decoded_logits(model, SEQUENCES)
    assert seen.keys() >= kernels
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    unfuse(model)
    seen.clear()
    assert (decoded_logits(model, SEQUENCES) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert seen.keys() <= {"decode_attention"}


@pytest.mark.parametrize("kernel", ["decode_attention", "rotate_and_store", "silu_and_mul", "rms_norm"])
def test_a_module_whose_kernel_is_wrong_is_left_alone(kernel, monkeypatch):
    module = {"decode_attention": attention, "rotate_and_store": rotary, "silu_and_mul": activation, "rms_norm": norm}
    right = getattr(module[kernel], kernel)
    monkeypatch.setattr(module[kernel], kernel, lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    monkeypatch.setattr(fast_attention, "are_available", lambda device: False)  # the original's attention is right
    model = tiny("LlamaConfig")
    fuse(model)
    fused = {type(child).__name__ for child in model.modules()} & {"FusedAttention", "FusedMLP", "FusedNorm"}
    left = {"silu_and_mul": "FusedMLP", "rms_norm": "FusedNorm"}.get(kernel, "FusedAttention")
    assert fused == {"FusedAttention", "FusedMLP", "FusedNorm"} - {left}


def test_prompts_and_other_caches_have_the_ordinary_attention(seen):
    model = tiny("LlamaConfig")
    fuse(model)
    seen.clear()
    model(torch.tensor([[3, 5, 7]], device=DEVICE))
    model.generate(torch.tensor([[3, 5, 7]], device=DEVICE), max_new_tokens=3)
    assert seen.keys() == {"rms_norm", "silu_and_mul", "rotate_and_store"}
