"""verl's trainer, whichever is installed, on CUDA with NCCL, in bfloat16 mixed precision.

    python -m pytest tests/gpu

Every case is one run of 3 steps with a round at each of them, and every test looks at one thing of it. (`-k` picks
cases; several workers would each make a case's run anew.) The measured peaks are printed at the end.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from checkpoints import plain_model
from end_to_end.trainer import HAS_ENGINES, Assets, Run, run, strategy, write_program
from gpu.conftest import needs_two
from gpu.near_ties import MAX_ULP, ulp_below_the_best
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "bias": "none", "task_type": "CAUSAL_LM"}
GREEDY = {"VERL_GENERATION_DO_SAMPLE": "false", "VERL_GENERATION_MAX_NEW_TOKENS": "24"}
# Enough for other answers than the untrained model's, too little for the same answer to every prompt.
LEARNING_RATE, LORA_LEARNING_RATE = "3e-5", "1e-3"
SAVE_CONTENTS = "checkpoint.save_contents" if HAS_ENGINES else "trainer.checkpoint.save_contents"
STEPS = [1, 2, 3]
MIB = 2**20

needs_flash_attn = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="verl's padding removal needs flash-attn"
)
needs_compiler = pytest.mark.skipif(
    not (shutil.which("gcc") or shutil.which("clang")) or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="triton needs a C compiler and Python's headers",
)


@dataclass(frozen=True)
class Case:
    fsdp: str
    num_ranks: int
    lora: bool = False
    name: str = ""
    overrides: tuple[str, ...] = ()
    in_host_memory: bool = False
    """Between the steps verl keeps the parameters there."""
    moved_whole: bool = False
    """For a gather a rank's whole share of them goes to the device, not one unit after the other."""
    repeatable: bool = True
    """A second run of the same has the same losses."""

    def __str__(self) -> str:
        parts = [self.fsdp, f"{self.num_ranks}-ranks", "lora" if self.lora else "full", self.name]
        return "-".join(part for part in parts if part)


def cases() -> Iterator[Any]:
    for fsdp, lora, num_ranks in itertools.product(("fsdp", "fsdp2"), (False, True), (1, 2)):
        # Adapters begin with random weights, which the older trainer does not seed.
        overrides = ("data.use_dynamic_bsz=false",) if HAS_ENGINES and lora else ()
        yield param(Case(fsdp, num_ranks, lora, overrides=overrides, repeatable=not lora))
    for num_ranks in (1, 2):
        if not HAS_ENGINES:
            offload = ("model.fsdp_config.cpu_offload=true", "model.fsdp_config.offload_params=true")
            yield param(Case("fsdp", num_ranks, name="offload", overrides=offload, in_host_memory=True))
            padding = ("use_remove_padding=true", f"ulysses_sequence_parallel_size={num_ranks}")
            case = Case("fsdp2", num_ranks, name="padding-removed", overrides=padding, repeatable=False)
            yield param(case, needs_flash_attn)
            continue
        offload = ("engine.param_offload=true", "engine.optimizer_offload=true")
        for fsdp in ("fsdp", "fsdp2"):
            yield param(Case(fsdp, num_ranks, name="offload", overrides=offload, in_host_memory=True, moved_whole=True))
        policy = ("engine.offload_policy=true",)
        yield param(Case("fsdp2", num_ranks, name="offload-policy", overrides=policy, in_host_memory=True))
    if HAS_ENGINES:
        ulysses = ("engine.ulysses_sequence_parallel_size=2",)
        yield param(Case("fsdp2", 2, name="ulysses", overrides=ulysses, repeatable=False))
        for fsdp, kernels, marks in (("fsdp", "torch", []), ("fsdp2", "triton", [needs_compiler])):
            fused = ("model.use_fused_kernels=true", f"model.fused_kernel_options.impl_backend={kernels}")
            yield param(Case(fsdp, 1, name=f"fused-{kernels}", overrides=fused, repeatable=False), *marks)


def param(case: Case, *marks: pytest.MarkDecorator) -> Any:
    marks += (needs_two,) if case.num_ranks == 2 else ()
    return pytest.param(case, marks=marks)


# Goes before the imports of a program with verl's trainer.
MEASURE = """
import json, torch, torch.distributed
from unittest.mock import patch
from verl_valgen.rounds.rounds import ValidationRounds

# The backward passes of the other kernels add up in no fixed order, and the losses of two runs are compared.
torch.backends.cuda.enable_flash_sdp(False)
torch.backends.cuda.enable_mem_efficient_sdp(False)
torch.backends.cuda.enable_cudnn_sdp(False)

run_round = ValidationRounds.run

def measured_round(self, step):
    model = self.host.model
    # A forward pass leaves FSDP1's root whole, and a gather frees it. The allocator gives blocks of 512 bytes.
    whole = [p._full_param_padded for p in model.parameters() if hasattr(p, "_full_param_padded")]
    figures = {"step": step, "left_whole": sum(-(-w.untyped_storage().size() // 512) * 512 for w in whole)}
    gather = self.host.gather

    def gather_and_save(*args, **kwargs):
        copy = gather(*args, **kwargs)
        if copy is not None and step == 3:
            torch.save(dict(copy.named_parameters()), "copy.pt")
        return copy

    # The workspaces that cuBLAS has in other threads, autograd's among them, are freed with those of a round, and are
    # given anew by the next backward pass: none is counted.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.reset_peak_memory_stats()
    figures["before"] = torch.cuda.memory_allocated()
    with patch.object(self.host, "gather", gather_and_save):
        run_round(self, step)
    torch._C._cuda_clearCublasWorkspaces()
    figures["after"] = torch.cuda.memory_allocated()
    figures["peak"] = torch.cuda.max_memory_allocated()
    figures["devices"] = sorted({parameter.device.type for parameter in model.parameters()})
    with open(f"rounds_rank_{torch.distributed.get_rank()}.jsonl", "a") as file:
        print(json.dumps(figures), file=file)

ValidationRounds.run = measured_round

"""


def train(directory: Path, case: Case, assets: Assets, *, test_freq: int, save: str) -> Run:
    """A run of the case, with its rounds measured on every rank.

    Args:
        save: What goes into the checkpoint: "model", or "extra", which is next to nothing.
    """
    overrides = [
        *assets.overrides(multiturn=True),
        strategy(case.fsdp),
        f"optim.lr={LORA_LEARNING_RATE if case.lora else LEARNING_RATE}",
        f"trainer.test_freq={test_freq}",
        f"{SAVE_CONTENTS}=[{save}]",
        *(["data.num_workers=0"] if HAS_ENGINES else []),
        *(["engine.full_determinism=true"] if HAS_ENGINES and case.repeatable else []),
        *(["model.lora_rank=8"] if case.lora else []),
        *case.overrides,
    ]
    return run(
        directory,
        overrides,
        environment=GREEDY | {"OMP_NUM_THREADS": "8", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        num_ranks=None if case.num_ranks == 1 else case.num_ranks,
        program=write_program(directory / "program.py", "pass", before=MEASURE),
    )


@pytest.fixture(scope="module", params=cases(), ids=str)
def finished(request, tmp_path_factory, assets) -> Iterator[tuple[Case, Run]]:
    directory = tmp_path_factory.mktemp("run")
    result = train(directory, request.param, assets, test_freq=1, save="model")
    assert result.returncode == 0, result.output[-5000:]
    yield request.param, result
    shutil.rmtree(directory)


def rounds(case: Case, result: Run) -> list[list[dict[str, Any]]]:
    """The figures of each round, in bytes, rank by rank."""
    files = [result.directory / f"rounds_rank_{rank}.jsonl" for rank in range(case.num_ranks)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.fixture(scope="module")
def trained(finished, assets) -> PreTrainedModel:
    """The plain model of the case's last checkpoint."""
    case, result = finished
    return trained_model(result, assets, lora=case.lora)


def trained_model(result: Run, assets: Assets, *, lora: bool) -> PreTrainedModel:
    """The last checkpoint as a plain model in bfloat16, which has been made without the package."""
    # FSDP2's shards were saved from the devices that they lay on.
    with patch.object(torch, "load", partial(torch.load, map_location="cpu")):
        model = plain_model(result.checkpoints / "global_step_3", assets.model, LORA if lora else None)
    for parameter in model.parameters():  # its buffers (rotary tables) stay in float32, as in any loaded model
        parameter.data = parameter.data.to(torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"
    return model.to("cuda")


def token_ids(sample: dict[str, Any], assets: Assets) -> tuple[list[int], list[int]]:
    """The token ids of a sample's prompt and answer."""
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    prompt_ids = tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]
    # This tokenizer has one token per character: encoding the text gives the generated ids back.
    output_ids = tokenizer(sample["generation"], add_special_tokens=False)["input_ids"]
    output_ids += [tokenizer.eos_token_id] * (sample["finish_reason"] == "eos")
    assert (len(prompt_ids), len(output_ids)) == (sample["num_prompt_tokens"], sample["num_new_tokens"])
    return prompt_ids, output_ids


def answers_ulp_below_the_best(
    result: Run, assets: Assets, model: PreTrainedModel, *, strategy_name: str = "default"
) -> list[float]:
    """For each answer of the last round, the distance of the worst token, as `ulp_below_the_best` measures it."""
    samples = [sample for sample in result.samples(3) if sample["strategy"] == strategy_name]
    assert [sample["params"]["dtype"] for sample in samples] == ["bfloat16"] * 5
    return [max(ulp_below_the_best(model, *token_ids(sample, assets))) for sample in samples]


def test_the_copy_is_the_trained_model(finished, trained):
    case, result = finished
    copy = torch.load(result.directory / "copy.pt", map_location=trained.device)
    assert copy.keys() == dict(trained.named_parameters()).keys()
    for name, parameter in trained.named_parameters():
        # Adapters are added to the weights in float32, here by other kernels: a last bit may differ.
        rtol, atol = (2**-7, 1e-5) if case.lora else (0, 0)
        torch.testing.assert_close(copy[name].detach(), parameter.detach(), rtol=rtol, atol=atol, msg=name)


def test_greedy_is_that_of_the_plain_model(finished, assets, trained, untrained):
    _, result = finished
    assert sorted(path.name for path in result.generations.glob("*.jsonl")) == [
        f"step_{step:08d}.jsonl" for step in STEPS
    ]
    worst = answers_ulp_below_the_best(result, assets, trained)
    assert max(worst) <= MAX_ULP, worst
    assert max(answers_ulp_below_the_best(result, assets, untrained)) > MAX_ULP, "any weights would have passed"


def test_memory_is_back_at_its_level_after_a_round(finished):
    for rank_rounds in rounds(*finished):
        assert [figures["step"] for figures in rank_rounds] == STEPS
        for figures in rank_rounds:
            assert figures["after"] == figures["before"] - figures["left_whole"]


def test_parameters_are_where_verl_keeps_them(finished):
    case, result = finished
    expected = ["cpu" if case.in_host_memory else "cuda"]
    for rank_rounds in rounds(case, result):
        assert [figures["devices"] for figures in rank_rounds] == [expected] * len(STEPS)


def test_a_round_takes_the_copy_and_a_unit_on_rank_0_and_a_unit_elsewhere(finished, assets, record_property):
    case, result = finished
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(assets.model))
    num_parameters = model.num_parameters()
    if case.fsdp == "fsdp":
        layer_size = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
        unit_bytes = 4 * max(layer_size, num_parameters - len(model.model.layers) * layer_size)
    else:
        unit_bytes = 2 * 4 * max(parameter.numel() for parameter in model.parameters())

    bound = unit_bytes + 16 * MIB  # and what is small: rotary tables, adapters, the allocator's rounding
    if case.moved_whole:
        bound += 4 * num_parameters // case.num_ranks
    elif case.in_host_memory:
        bound += unit_bytes  # the unit's share
    # On rank 0 the keys and values of the answers, and what the prompts' forward pass takes, come to less than 100 MiB.
    # Until the last adapter of a layer is there, its weights are in float32.
    bounds = [bound + 2 * num_parameters + case.lora * unit_bytes + 100 * MIB] + [bound] * (case.num_ranks - 1)

    peaks = [max(figures["peak"] - figures["after"] for figures in rank_rounds) for rank_rounds in rounds(case, result)]
    record_property(
        "peak_bytes_per_parameter",
        ", ".join(f"rank {rank} {peak / num_parameters:.3f}" for rank, peak in enumerate(peaks)),
    )
    for peak, bound in zip(peaks, bounds, strict=True):
        assert peak <= bound
    assert peaks[0] >= 2 * num_parameters  # else nothing has been measured


def test_rounds_between_the_steps_change_no_loss(finished, assets, tmp_path):
    case, often = finished
    if not case.repeatable:
        pytest.skip("two runs of it differ anyway, or are made for their samples alone")
    once = train(tmp_path, case, assets, test_freq=-1, save="extra")
    assert once.returncode == 0, once.output[-5000:]
    assert [path.name for path in once.generations.glob("*.jsonl")] == ["step_00000003.jsonl"]
    assert len(often.logged("train/loss")) == len(STEPS)
    assert often.logged("train/loss") == once.logged("train/loss")
    assert often.logged("val/loss")[-1:] == once.logged("val/loss")


SHARDED = ("+generation.gather=sharded",)
SPREAD = ("+generation.ranks=2", "+generation.batch_size=2")


@pytest.mark.parametrize(
    ("fsdp", "lora", "num_ranks", "how"),
    [
        ("fsdp2", False, 1, ()),
        pytest.param("fsdp", True, 2, (), marks=needs_two),
        pytest.param("fsdp", True, 2, SHARDED, marks=needs_two),
        pytest.param("fsdp2", False, 2, SHARDED, marks=needs_two),
        pytest.param("fsdp2", True, 2, SPREAD, marks=needs_two),
    ],
)
def test_verls_own_command(tmp_path, assets, fsdp, lora, num_ranks, how):
    overrides = [*assets.overrides(multiturn=True), strategy(fsdp), f"{SAVE_CONTENTS}=[model]", *how]
    overrides += ["model.lora_rank=8"] if lora else [f"optim.lr={LEARNING_RATE}"]
    result = run(tmp_path, overrides, environment=GREEDY, num_ranks=None if num_ranks == 1 else num_ranks)
    assert result.returncode == 0, result.output[-5000:]
    assert "verl runs on CPU" not in result.output
    assert sorted(path.name for path in result.generations.glob("*.jsonl")) == [
        "step_00000002.jsonl",
        "step_00000003.jsonl",
    ]
    worst = answers_ulp_below_the_best(result, assets, trained_model(result, assets, lora=lora))
    assert max(worst) <= MAX_ULP, worst
    shutil.rmtree(result.checkpoints / "global_step_3")


STRATEGIES = (
    "{greedy: {do_sample: false}, nucleus: {top_p: 0.95}, beams: {do_sample: false, num_beams: 2}, top: {best_of: 3}}"
)


@pytest.mark.parametrize(
    ("fsdp", "lora", "num_ranks", "how"),
    [
        ("fsdp2", True, 1, ()),
        pytest.param("fsdp", False, 2, SPREAD, marks=needs_two),
        pytest.param("fsdp2", False, 2, SHARDED, marks=needs_two),
    ],
)
def test_strategies_and_their_likelihoods(tmp_path, assets, fsdp, lora, num_ranks, how):
    overrides = [*assets.overrides(multiturn=True), strategy(fsdp), f"{SAVE_CONTENTS}=[model]", *how]
    overrides += ["model.lora_rank=8"] if lora else [f"optim.lr={LEARNING_RATE}"]
    overrides += [f"+generation.strategies={STRATEGIES}", "+generation.n=2", "+generation.metrics=[exact_match]"]
    overrides += ["+generation.before_train=true", "+generation.max_new_tokens=24"]
    result = run(tmp_path, overrides, num_ranks=None if num_ranks == 1 else num_ranks)
    assert result.returncode == 0, result.output[-5000:]
    assert not [line for line in result.output.splitlines() if "WARNING" in line and "verl_valgen" in line]
    for step in (0, 2, 3):
        assert len(result.samples(step)) == 5 * (1 + 2 + 1 + 2)
    model = trained_model(result, assets, lora=lora)
    worst = answers_ulp_below_the_best(result, assets, model, strategy_name="greedy")
    assert max(worst) <= MAX_ULP, worst
    for sample in result.samples(3):
        assert sample["scores"]["exact_match"] in (0.0, 1.0)
        if sample["strategy"] == "top":
            logprob = mean_logprob(model, *token_ids(sample, assets))
            assert sample["scores"]["mean_logprob"] == pytest.approx(logprob, abs=0.03)  # of bfloat16 logits
    shutil.rmtree(result.checkpoints / "global_step_3")


@torch.no_grad()
def mean_logprob(model: PreTrainedModel, prompt_ids: list[int], output_ids: list[int]) -> float:
    logits = model(torch.tensor([prompt_ids + output_ids], device="cuda")).logits[0, len(prompt_ids) - 1 : -1]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    return logprobs[torch.arange(len(output_ids)), output_ids].mean().item()
