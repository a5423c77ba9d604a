"""Measures the package's cost with generation off: verl's command up to its task function, and a training step.

    python benchmarks/disabled.py

Runs with and without the package take turns. `--cfg job` composes the configuration, plugins and all, prints it and
ends. The training runs are on CPU, which verl cannot do alone: "without" is verl's own program with nothing but the CPU
support, and no plugin is discovered.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
REPETITIONS, TRAINING_RUNS, TRAINING_STEPS = 7, 3, 40
HAS_FSDP_SFT = importlib.util.find_spec("verl.trainer.fsdp_sft_trainer") is not None
MODULE = "verl.trainer.fsdp_sft_trainer" if HAS_FSDP_SFT else "verl.trainer.sft_trainer"

START_UP = """
import runpy, sys
root, module, how = sys.argv[1:]
if how == "without":
    sys.path = [path for path in sys.path if path != root]  # where an editable install is found
sys.argv = [module, "--cfg", "job"]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    print("loaded:", sorted(name for name in sys.modules if name.startswith("verl_valgen")))
"""
TRAINING = """
import atexit, importlib, json, runpy, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
root, module, how, *overrides = sys.argv[1:]
stamps = []
register_optimizer_step_post_hook(lambda *args: stamps.append(time.perf_counter()))
sys.argv = [module, *overrides]
try:
    if how == "with":
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        from verl_valgen.activation import single_process_environment
        from verl_valgen.hosts import load_host_class
        host_class = load_host_class(module)
        sys.path = [path for path in sys.path if path != root]
        verl = importlib.import_module(module)
        run_verl = verl.run_sft
        def run_sft(config):
            with single_process_environment(), host_class.launch_support(verl, config):
                run_verl(config)
        verl.run_sft = run_sft
        verl.main()
finally:
    with open(how + ".json", "w") as file:
        json.dump([b - a for a, b in zip(stamps, stamps[1:])], file)
"""


def main() -> None:
    times: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(REPETITIONS):
        for how, values in times.items():
            start = time.perf_counter()
            output = run(START_UP, how, cwd="/")
            values.append(time.perf_counter() - start)
            loaded = output.rpartition("loaded:")[2].strip()
            assert (loaded == "[]") == (how == "without"), loaded
    show(f"{MODULE}, start-up, s", times, 2)

    with tempfile.TemporaryDirectory() as folder:
        overrides = write_assets(Path(folder))
        steps: dict[str, list[float]] = {"with": [], "without": []}
        for _ in range(TRAINING_RUNS):
            for how, values in steps.items():
                shutil.rmtree(Path(folder, "checkpoints"), ignore_errors=True)  # verl would resume from it
                run(TRAINING, how, *overrides, cwd=folder)
                values.append(statistics.median(json.loads(Path(folder, f"{how}.json").read_text())))
    show("a training step, ms", {how: [value * 1e3 for value in values] for how, values in steps.items()}, 2)


def run(program: str, how: str, *arguments: str, cwd: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    command = [sys.executable, "-c", program, ROOT, MODULE, how, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=cwd)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def write_assets(folder: Path) -> list[str]:
    sys.path.insert(0, f"{ROOT}/examples")
    import assets

    assets.write_model(folder / "model")
    train, val = assets.write_questions(folder, num_train=8 * (TRAINING_STEPS + 1), num_val=8, multiturn=True)
    model_key = "model.partial_pretrain" if HAS_FSDP_SFT else "model.path"
    return [
        f"data.train_files={train}", f"data.val_files={val}", "data.train_batch_size=8",
        "data.micro_batch_size_per_gpu=8", "data.max_length=256", f"{model_key}={folder}/model",
        *(["data.multiturn.enable=true"] if HAS_FSDP_SFT else []),
        f"trainer.total_training_steps={TRAINING_STEPS}", "trainer.total_epochs=1", "trainer.logger=[console]",
        f"trainer.default_local_dir={folder}/checkpoints", f"hydra.run.dir={folder}/hydra",
    ]  # fmt: skip


def show(what: str, times: dict[str, list[float]], digits: int) -> None:
    pairs = zip(times["with"], times["without"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    with_it, without = (statistics.median(times[how]) for how in ("with", "without"))
    number = len(times["with"])
    print(f"{what}: with {with_it:.{digits}f}, without {without:.{digits}f} (medians of {number}), ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
