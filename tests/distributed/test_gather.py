"""The gathered copy is the model, bit for bit, under verl's own wrapping; and no rank waits for one that failed."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.testing import run_distributed
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, ShardingStrategy
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from verl_valgen.collectives import agree
from verl_valgen.hosts.cpu import cpu_platform
from verl_valgen.weights import dtensors
from verl_valgen.weights import gather as gather_module
from verl_valgen.weights.dtensors import Wanted, whole_tensors
from verl_valgen.weights.empty import empty_from_config, empty_like
from verl_valgen.weights.gather import collect, gather
from verl_valgen.weights.plain_copy import PlainCopy
from verl_valgen.weights.sizes import largest_unit_bytes, num_parameters

CPU = torch.device("cpu")
SIZES = {
    # 37 rows on two ranks: uneven shards.
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 50, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LORA = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "bias": "none", "task_type": "CAUSAL_LM"}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False), None),
    "tied": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True), None),
    "dynamic-rope": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        None,
    ),
    "lora": (LlamaForCausalLM, LlamaConfig(**SIZES), LORA),
    "lora-tied": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True), LORA),
    "rslora-with-trained-head": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES),
        LORA | {"use_rslora": True, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
    ),
    "dora": (LlamaForCausalLM, LlamaConfig(**SIZES), LORA | {"use_dora": True}),
}
CASES = [(name, strategy) for name in MODELS for strategy in ("fsdp", "fsdp2")]
# FSDP1 flattens a unit's parameters: those of one unit must all be trainable or all frozen.
CASES.remove(("rslora-with-trained-head", "fsdp"))
# On two ranks every model once, the plain one and LoRA under both strategies; the rest is slow.
QUICK = {
    ("llama", "fsdp"), ("llama", "fsdp2"), ("tied", "fsdp"), ("dynamic-rope", "fsdp2"), ("lora", "fsdp"),
    ("lora", "fsdp2"), ("lora-tied", "fsdp2"), ("rslora-with-trained-head", "fsdp2"), ("dora", "fsdp2"),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """A model with random weights, adapters included (PEFT's own begin at zero), the same on every rank."""
    cls, config, lora = MODELS[name]
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config))
    if lora is not None:
        model = get_peft_model(model, LoraConfig(**lora))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.1)
    return model


def wrap(model: nn.Module, strategy: str, param_dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """As verl's trainers do, mixed precision and wrap policy included."""
    with cpu_platform():
        return wrap_as_verl(model, strategy, param_dtype)


def wrap_as_verl(model: nn.Module, strategy: str, param_dtype: torch.dtype) -> nn.Module:
    from verl.utils.fsdp_utils import apply_fsdp2, fsdp2_load_full_state_dict, get_fsdp_wrap_policy

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    if strategy == "fsdp":
        return FSDP(
            model,
            use_orig_params=False,
            auto_wrap_policy=get_fsdp_wrap_policy(model, config={}, is_lora=hasattr(model, "peft_config")),
            device_id=CPU,
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            mixed_precision=MixedPrecision(param_dtype, reduce_dtype=torch.float32, buffer_dtype=torch.float32),
            device_mesh=mesh,
        )
    state = model.state_dict()
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=True)
    apply_fsdp2(model, {"mesh": mesh, "mp_policy": policy, "offload_policy": None, "reshard_after_forward": True}, {})
    fsdp2_load_full_state_dict(model, state, mesh, None)
    return model


def merged(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What the copy must be: PEFT's own merge in float32, then the cast."""
    plain = model.merge_and_unload() if hasattr(model, "peft_config") else model
    rotary = {name: buffer for name, buffer in plain.named_buffers() if "inv_freq" in name}
    plain = plain.to(dtype).eval()
    for name, buffer in rotary.items():  # as `from_pretrained(dtype=...)` leaves them
        module, _, key = name.rpartition(".")
        plain.get_submodule(module)._buffers[key] = buffer
    return plain


def differences(actual: nn.Module, expected: nn.Module) -> list[str]:
    """Names of the tensors that are not bit for bit those expected."""
    tensors = [
        {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for model in (actual, expected)
    ]
    missing = tensors[0].keys() ^ tensors[1].keys()
    return sorted(missing) + [
        name
        for name in tensors[0].keys() & tensors[1].keys()
        if tensors[0][name].dtype != tensors[1][name].dtype or not torch.equal(tensors[0][name], tensors[1][name])
    ]


def forward(model: nn.Module, *, train: bool) -> torch.Tensor:
    ids = torch.arange(12)[None] % 37
    model.train(train)
    with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        if train:
            logits.float().logsumexp(-1).mean().backward()
    return logits.detach()


def gather_case(name: str, strategy: str) -> dict[str, Any]:
    """One case on one rank: gathers before the first forward, after an evaluation, and in bfloat16."""
    expected = build(name)
    wrapped, control = wrap(build(name), strategy), wrap(build(name), strategy)
    keep = dist.get_rank() == 0
    result: dict[str, Any] = {}

    def compare(label: str, dtype: torch.dtype) -> None:
        state = torch.get_rng_state()
        plain = gather(wrapped, dtype=dtype, device=CPU, keep=keep)
        result[f"{label}: kept"] = plain is not None
        result[f"{label}: random state"] = torch.equal(state, torch.get_rng_state())
        if plain is not None:
            result[f"{label}: differences"] = differences(plain, merged(copy.deepcopy(expected), dtype))
            result[f"{label}: training"] = plain.training
            result[f"{label}: class"] = type(plain).__name__
            result[f"{label}: tied"] = plain.lm_head.weight is plain.model.embed_tokens.weight

    compare("before the first forward", torch.float32)
    result["forward"] = torch.equal(forward(wrapped, train=False), forward(control, train=False))
    compare("after an evaluation", torch.float32)
    compare("in bfloat16", torch.bfloat16)
    # A training step afterwards is that of a model that was never gathered.
    result["train"] = torch.equal(forward(wrapped, train=True), forward(control, train=True))
    grads = [[p.grad for p in model.parameters() if p.grad is not None] for model in (wrapped, control)]
    local = [[g.to_local() if hasattr(g, "to_local") else g for g in some] for some in grads]
    result["gradients"] = bool(local[0]) and all(torch.equal(a, b) for a, b in zip(*local, strict=True))
    compare("after a training step", torch.float32)
    return result


@pytest.mark.parametrize(
    ("world_size", "name", "strategy"),
    [
        pytest.param(
            world_size,
            name,
            strategy,
            id=f"{world_size}-ranks-{name}-{strategy}",
            marks=[] if world_size == 2 and (name, strategy) in QUICK else pytest.mark.slow,
        )
        for world_size in (1, 2)
        for name, strategy in CASES
    ],
)
def test_the_copy_is_the_model(tmp_path, world_size, name, strategy):
    for rank, result in enumerate(run_distributed(gather_case, world_size, tmp_path, name, strategy)):
        labels = [key.removesuffix(": kept") for key in result if key.endswith(": kept")]
        assert len(labels) == 4
        for label in labels:
            assert result[f"{label}: kept"] == (rank == 0)
            assert result[f"{label}: random state"], f"{label}: the gather drew random numbers"
            if rank == 0:
                assert result[f"{label}: differences"] == []
                assert result[f"{label}: training"] is False
                assert result[f"{label}: class"] == MODELS[name][0].__name__
                assert result[f"{label}: tied"] == MODELS[name][1].tie_word_embeddings
        assert result["forward"], f"rank {rank}: evaluation differs after a gather"
        assert result["train"], f"rank {rank}: training differs after a gather"
        assert result["gradients"], f"rank {rank}: gradients differ after a gather"


def fail_at(stage: str) -> tuple[str, bool, bool]:
    """Rank 0 fails while it prepares or while it receives; both ranks then do one more collective.

    Returns what came of it, whether the ranks met, and whether the failed copy was gone at the next parameter.
    """
    wrapped = wrap(build("llama"), "fsdp2")
    receive, full_parameters = PlainCopy.receive, gather_module.full_parameters
    copies: list[weakref.ref] = []
    gone = True

    def watched_parameters(*args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal gone
        for item in full_parameters(*args, **kwargs):
            yield item
            gone = all(ref() is None for ref in copies)

    def failing_init(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("planted")

    def failing_receive(self: PlainCopy, name: str, parameter: torch.Tensor) -> None:
        if "layers.1" in name:
            copies.append(weakref.ref(self))
            raise torch.OutOfMemoryError("planted")
        receive(self, name, parameter)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            if stage == "prepare":
                patch.setattr(PlainCopy, "__init__", failing_init)
            elif stage == "receive":
                patch.setattr(PlainCopy, "receive", failing_receive)
                patch.setattr(gather_module, "full_parameters", watched_parameters)
        try:
            keep = dist.get_rank() == 0
            outcome = repr(gather(wrapped, dtype=torch.float32, device=CPU, keep=keep))
        except Exception as e:
            outcome = f"{type(e).__name__}: {e}"
    return outcome, agree(True, CPU), gone


STAGES = ("prepare", "receive")


def failures_and_agreements() -> dict[str, Any]:
    agreements = {refusing: agree(dist.get_rank() != refusing, CPU) for refusing in (None, 0, 1)}
    wrapped = [wrap(build("llama"), strategy) for strategy in ("fsdp", "fsdp2")]
    sizes, numbers = [largest_unit_bytes(model) for model in wrapped], [num_parameters(model) for model in wrapped]
    return {"agreements": agreements, "sizes": sizes, "numbers": numbers} | {stage: fail_at(stage) for stage in STAGES}


def test_a_failure_is_raised_where_it_happened_and_no_rank_waits(tmp_path: Path):
    first, second = run_distributed(failures_and_agreements, 2, tmp_path)
    assert first["prepare"] == ("MemoryError: planted", True, True)
    assert first["receive"] == ("OutOfMemoryError: planted", True, True)
    assert {second[stage] for stage in STAGES} == {("None", True, True)}
    # In float32: under FSDP1 a decoder layer (attention, MLP, two norms), under FSDP2 twice a matrix of the MLP.
    layer = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 50 * 16 + 2 * 16
    assert first["sizes"] == [4 * layer, 4 * 2 * 50 * 16]
    assert first["numbers"] == second["numbers"] == [build("llama").num_parameters()] * 2
    assert first["agreements"] == second["agreements"] == {None: True, 0: False, 1: False}


def test_a_parameter_that_never_came_is_named():
    plain = PlainCopy(empty_like(build("llama"), torch.float32), CPU)
    plain.receive("lm_head.weight", torch.zeros(37, 16))
    with pytest.raises(RuntimeError, match=r"20 parameters were not gathered, model\.embed_tokens\.weight first"):
        plain.finish()


class WithBuffer(LlamaForCausalLM):
    """A model with a buffer that state dicts hold, in two places like the weights."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.full((2,), 0.1))

    @classmethod
    def from_config(cls, config: LlamaConfig) -> WithBuffer:
        return cls(config)


def collect_stream(name: str) -> list[str] | None:
    """Rank 0 copies a model that an engine would export: its state dict, tied weights once. Other ranks exhaust it."""
    cls, config, _ = MODELS[name]
    cls, auto_class = (WithBuffer, WithBuffer) if name == "llama" else (cls, AutoModelForCausalLM)
    torch.manual_seed(0)
    source = cls(copy.deepcopy(config))
    before = torch.get_rng_state()
    exported = dict(source.state_dict())
    if config.tie_word_embeddings:
        del exported["lm_head.weight"]
    model = collect(
        lambda _: (pair for pair in exported.items()),
        lambda: PlainCopy(empty_from_config(auto_class, config, torch.bfloat16), CPU),
        dtype=torch.bfloat16,
        device=CPU,
        keep=dist.get_rank() == 0,
    )
    assert torch.equal(before, torch.get_rng_state())
    assert len(exported) > 5
    return None if model is None else differences(model, merged(source, torch.bfloat16))


def streams() -> list[Any]:
    return [collect_stream(name) for name in ("llama", "tied", "dynamic-rope")]


def test_an_exported_stream_of_weights_becomes_the_same_copy(tmp_path: Path):
    assert run_distributed(streams, 2, tmp_path) == [[[], [], []], [None, None, None]]


def test_a_weight_that_the_model_does_not_have_is_named():
    plain = PlainCopy(empty_from_config(AutoModelForCausalLM, MODELS["llama"][1], torch.float32), CPU)
    with pytest.raises(KeyError, match="experts"):
        plain.receive("model.layers.0.experts.weight", torch.zeros(1))


def test_the_copy_shares_no_memory_with_the_model():
    source = build("llama")
    before = copy.deepcopy(source.state_dict())
    plain = gather(source, dtype=torch.float32, device=CPU, keep=True)
    with torch.no_grad():
        for tensor in (*plain.parameters(), *plain.buffers()):
            tensor.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())


def of_placements() -> dict[str, Any]:
    """Tensors in every way that a mesh of two ranks can share them, whole again, and the collectives that it took."""
    mesh, two_dims = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    torch.manual_seed(0)
    tensors = {
        "even": (torch.randn(6, 4), mesh, [Shard(0)], torch.float32),
        "uneven": (torch.randn(5, 3), mesh, [Shard(0)], torch.float32),
        "cast": (torch.randn(5, 3, 2), mesh, [Shard(0)], torch.bfloat16),
        "on one rank": (torch.randn(1, 7), mesh, [Shard(0)], torch.bfloat16),
        "of one dimension": (torch.randn(3), mesh, [Shard(0)], torch.float64),
        "numbers": (torch.arange(7), mesh, [Shard(0)], torch.int64),
        "nothing": (torch.randn(0, 3), mesh, [Shard(0)], torch.float32),
        "by columns": (torch.randn(4, 6), mesh, [Shard(1)], torch.bfloat16),
        "everywhere": (torch.randn(4, 6), mesh, [Replicate()], torch.bfloat16),
        "in two dimensions": (torch.randn(4, 6), two_dims, [Replicate(), Shard(0)], torch.float32),
        "there, too": (torch.randn(5, 2), two_dims, [Replicate(), Shard(0)], torch.bfloat16),
        "in both": (torch.randn(4, 6), two_dims, [Shard(0), Shard(1)], torch.float32),
        "no DTensor": (torch.randn(2, 3), None, None, torch.bfloat16),
        "large": (torch.randn(300, 2), mesh, [Shard(0)], torch.float32),
        "a quarter of it": (torch.randn(70, 2), mesh, [Shard(0)], torch.float32),
        "another quarter": (torch.randn(70, 2), mesh, [Shard(0)], torch.float32),
        "a third": (torch.randn(100, 2), mesh, [Shard(0)], torch.float32),
    }
    wanted = [
        Wanted(name, value if mesh is None else distribute_tensor(value, mesh, placements), dtype)
        for name, (value, mesh, placements, dtype) in tensors.items()
    ]
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        send = dtensors._all_gather
        patch.setattr(dtensors, "_all_gather", lambda out, *args: (sizes.append(out.numel()), send(out, *args)))
        whole = [(name, tensor.clone()) for name, tensor in whole_tensors(wanted, CPU)]
    assert [name for name, _ in whole] == list(tensors)
    wrong = [
        name for name, found in whole if not torch.equal(found, tensors[name][0].to(tensors[name][3]))
    ]  # torch.equal is false where dtypes differ
    return {"wrong": wrong, "sizes": sizes, "shapes": [tuple(found.shape) for _, found in whole]}


def test_tensors_are_whole_however_they_are_shared(tmp_path: Path):
    first, second = run_distributed(of_placements, 2, tmp_path)
    assert first == second
    assert first["wrong"] == []
    # Six together, two of the other mesh, the large one, two that are half of it with their padding, and one more.
    assert len(first["sizes"]) == 5
    assert first["sizes"][2:] == [2400, 2 * 2 * 288, 800]
