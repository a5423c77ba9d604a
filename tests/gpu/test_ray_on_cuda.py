"""verl's Ray trainer with two workers on CUDA with NCCL, and what a round takes beside `verl.trainer.sft_trainer`.

    python -m pytest tests/gpu/test_ray_on_cuda.py

Needs a package of Ray with its raylet, and 20 cores, for which verl asks.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from end_to_end.clusters import own_cluster
from end_to_end.trainer import ENGINE, HAS_ENGINES, HAS_RAY, RAY, Assets, Run, run, strategy, write_program
from gpu.conftest import needs_two
from gpu.near_ties import MAX_ULP
from gpu.test_trainers import GREEDY, LEARNING_RATE, MIB, STEPS, Case, answers_ulp_below_the_best, rounds, trained_model


def has_raylet() -> bool:
    """Some packages of Ray are made without, as they are large: with those alone no cluster can be started."""
    spec = importlib.util.find_spec("ray")
    return spec is not None and (Path(str(spec.origin)).parent / "core/src/ray/raylet/raylet").is_file()


pytestmark = [
    needs_two,
    pytest.mark.skipif(not (HAS_RAY and HAS_ENGINES), reason="this verl has no verl.trainer.sft_trainer_ray"),
    pytest.mark.skipif(not has_raylet(), reason="needs Ray, and its raylet"),
]

# Sent to the workers by value; the SPMD trainer calls it itself.
MEASURE = """
def measure(worker=None):
    import json, time
    import torch
    from verl_valgen.rounds.local import LocalAnswerer

    begin, finish = LocalAnswerer.begin, LocalAnswerer.finish
    figures = {}

    def allocated():
        # Those of other threads are freed with those of a round, and given anew by the next backward pass.
        if torch.cuda.is_available():
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def measured_begin(self, *args, **kwargs):
        # A forward pass leaves FSDP1's root whole, and a gather frees it. The allocator gives blocks of 512 bytes.
        whole = [p._full_param_padded for p in self.host.model.parameters() if hasattr(p, "_full_param_padded")]
        figures["left_whole"] = sum(-(-w.untyped_storage().size() // 512) * 512 for w in whole)
        figures["before"] = allocated()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        figures["seconds"] = -time.perf_counter()
        return begin(self, *args, **kwargs)

    def measured_finish(self, *args, **kwargs):
        result = finish(self, *args, **kwargs)
        figures["seconds"] += time.perf_counter()
        figures["peak"] = torch.cuda.max_memory_allocated()
        figures["after"] = allocated()
        with open(f"rounds_rank_{torch.distributed.get_rank()}.jsonl", "a") as file:
            print(json.dumps(figures), file=file)
        return result

    LocalAnswerer.begin, LocalAnswerer.finish = measured_begin, measured_finish

"""

MEASURED = """
def fit(self):
    if hasattr(self.training_client, "workers"):
        import ray

        ray.get([worker.__ray_call__.remote(measure) for worker in self.training_client.workers])
    else:
        measure()
    return super().fit()
"""


def train(directory: Path, assets: Assets, fsdp: str, module: str) -> Run:
    """Three steps on two ranks, with a round after each."""
    overrides = [
        *assets.overrides(multiturn=True), strategy(fsdp), f"optim.lr={LEARNING_RATE}", "trainer.test_freq=1",
        "checkpoint.save_contents=[model]", "trainer.n_gpus_per_node=2",
    ]  # fmt: skip
    with own_cluster(hides_devices=False) as cluster:
        result = run(
            directory,
            overrides,
            environment=GREEDY | cluster.environment | {"OMP_NUM_THREADS": "8"},
            num_ranks=None if module == RAY else 2,
            program=write_program(directory / "program.py", MEASURED, before=MEASURE, module=module),
        )
    assert result.returncode == 0, result.output[-5000:]
    return result


@pytest.fixture(scope="module", params=["fsdp", "fsdp2"])
def finished(request, tmp_path_factory, assets) -> Iterator[tuple[Case, Run, Run]]:
    """Which FSDP, the run with Ray and the one without."""
    directory = tmp_path_factory.mktemp("run")
    runs = [train(directory / module, assets, request.param, module) for module in (RAY, ENGINE)]
    yield Case(request.param, 2), *runs
    shutil.rmtree(directory)


def test_every_round_is_recorded_and_proved(finished):
    _, with_ray, _ = finished
    assert "verl runs on CPU" not in with_ray.output
    for step in STEPS:
        samples = with_ray.samples(step)
        assert [(s["row"], s["verified"], s["params"]["dtype"]) for s in samples] == [
            (row, True, "bfloat16") for row in range(5)
        ]
    assert with_ray.warnings_but_late == []


def test_greedy_is_that_of_the_plain_model(finished, assets):
    _, with_ray, _ = finished
    worst = answers_ulp_below_the_best(with_ray, assets, trained_model(with_ray, assets, lora=False))
    assert max(worst) <= MAX_ULP, worst


def test_memory_is_back_at_its_level_after_a_round(finished):
    case, with_ray, _ = finished
    for of_rank in rounds(case, with_ray):
        assert len(of_rank) == len(STEPS)
        for figures in of_rank:
            assert figures["after"] == figures["before"] - figures["left_whole"]
            assert figures["peak"] > figures["before"] > 0, "nothing was measured"


def seconds_of_rounds(case: Case, one: Run) -> list[float]:
    """On rank 0; the first round makes ready what the others find."""
    return [figures["seconds"] for figures in rounds(case, one)[0]]


def in_words(seconds: list[float]) -> str:
    """Every round's: few have a median that says little."""
    return f"{median(seconds):.2f} s ({', '.join(f'{one:.2f}' for one in seconds)})"


def test_a_round_takes_what_it_takes_without_ray(finished, record_property):
    case, *runs = finished
    peaks = [
        [max(figures["peak"] - figures["after"] for figures in of_rank) for of_rank in rounds(case, one)]
        for one in runs
    ]
    figures = [
        f"{first / MIB:.0f} MiB on rank 0, {second / MIB:.0f} on rank 1, {in_words(seconds_of_rounds(case, one))}"
        for (first, second), one in zip(peaks, runs, strict=True)
    ]
    record_property("round_with_ray", f"{figures[0]}; without Ray {figures[1]}")
    for with_ray, without in zip(*peaks, strict=True):
        assert with_ray <= without + 16 * MIB
