"""Runs of `verl.trainer.sft_trainer_ray` that its tests share, each with two forked workers.

`on` uses what the driver does: strategies, metrics, prompts of one's own, a round before training, a best value,
trackers; `off` is the same training without generation, `resumed` is `on` from its checkpoint in the middle of the
epoch. `program` is a trainer of one's own with the same training, whose rounds are answered while it goes on, and whose
parameters are in host memory between two steps. `sharded` trains adapters under FSDP1 and answers through the trained
model on both workers. `faulty` has a copy on both workers, and one fault after the other.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from end_to_end.server import TrainerServer
from end_to_end.trainer import GENERATION_CONFIG, RAY, Assets, Run, strategy, write_program
from same_training import SEED_AND_REPORT
from transformers import AutoModelForCausalLM

NUM_WORKERS = 2
NUM_ROWS = 3
STEPS, STOPPED_AT = 4, 2
"""Of the five steps of an epoch."""
ROUNDS = (0, 2, 4)
MAX_NEW_TOKENS = 8

METRICS = """
def shorter(sample):
    return float(sample.num_new_tokens < 9)
"""

# The class that trains, and what is loaded at the end; imported by verl in the driver and in its workers.
OBSERVER = """
import atexit, json, sys
trainer = [cls.__name__ for cls in sys.modules["__main__"].SFTTrainer.__mro__]

def report():
    loaded = sorted(name for name in sys.modules if name.startswith("verl_valgen"))
    json.dump(dict(trainer=trainer, loaded=loaded), open("observed.json", "w"))

atexit.register(report)
"""

# Each worker reports for itself; the driver has no rank.
SEED_DRIVER_AND_WORKERS = f"""{SEED_AND_REPORT}
from end_to_end.fork_group import at_worker_end
at_worker_end.append(report)
atexit.unregister(report)

def report_of_driver():
    os.environ["RANK"] = "driver"
    report()

atexit.register(report_of_driver)
"""

# The thread that answers waits until the driver has been asked for the batch of the step after the next: if training
# waited for answers, both would wait.
ANSWERS_WAIT_FOR_TRAINING = """
import threading, time
from pathlib import Path
from verl_valgen.backends.hf import HFBackend
from verl_valgen.hosts.loaders import CountingLoader

def hold_answers():
    generate, train = HFBackend.generate, CountingLoader.__iter__

    def answer(self, requests):
        if threading.current_thread() is not threading.main_thread():
            deadline = time.monotonic() + 100
            while not Path("trained_3").exists():
                assert time.monotonic() < deadline, "training is held"
                time.sleep(0.01)
            Path("answered_beside_training").touch()
        return generate(self, requests)

    def train_and_tell(self):
        for batch in train(self):
            yield batch
            Path(f"trained_{self.count}").touch()  # all that is done with the batch

    HFBackend.generate, CountingLoader.__iter__ = answer, train_and_tell

hold_answers()
"""

# In the workers, which count the rounds: rank 0 fails while it answers, rank 1 before the gather, and then both have
# a copy that is not what is trained.
FAULTS = """
import os
from verl_valgen.backends.hf import HFBackend
from verl_valgen.rounds import generation, proven
from verl_valgen.weights.plain_copy import PlainCopy

def plant():
    begin, free_bytes = proven.ProvenAnswerer.begin, generation.free_bytes
    generate, receive = HFBackend.generate, PlainCopy.receive
    round = 0

    def count(self, *args, **kwargs):
        nonlocal round
        round += 1
        return begin(self, *args, **kwargs)

    def fail_with_answers(self, requests):
        if round == 2 and os.environ["RANK"] == "0":
            raise RuntimeError("planted in the answers of rank 0")
        return generate(self, requests)

    def fail_before_the_gather(*args):
        if round == 3 and os.environ["RANK"] == "1":
            raise RuntimeError("planted before the gather of rank 1")
        return free_bytes(*args)

    def receive_wrongly(self, name, parameter):
        receive(self, name, -parameter if round == 5 and name == "lm_head.weight" else parameter)

    proven.ProvenAnswerer.begin, generation.free_bytes = count, fail_before_the_gather
    HFBackend.generate, PlainCopy.receive = fail_with_answers, receive_wrongly

plant()
"""

PROGRAM = """
def fit(self):
    import json
    batch = next(iter(self.val_dataloader))
    json.dump([self.generate_samples(batch), self.generate_samples(batch)], open("answers.json", "w"))
    return super().fit()
"""


@dataclass(frozen=True)
class RayRuns:
    on: Run
    off: Run
    resumed: Run
    program: Run
    sharded: Run
    faulty: Run


def training(assets: Assets, fsdp: str, *overrides: str) -> list[str]:
    return [
        *assets.overrides(), strategy(fsdp), f"trainer.n_gpus_per_node={NUM_WORKERS}", "optim.lr=3e-4",
        f"trainer.total_training_steps={STEPS}", "trainer.test_freq=2", f"trainer.save_freq={STOPPED_AT}", *overrides,
    ]  # fmt: skip


def generation(*overrides: str) -> list[str]:
    return [f"generation.max_new_tokens={MAX_NEW_TOKENS}", f"trainer.max_val_samples={NUM_ROWS}", *overrides]


OF_THE_DRIVER = (
    "generation.strategies={greedy: {do_sample: false}, nucleus: {top_p: 0.95, top_k: 0}}",
    *("generation.n=2", "generation.before_train=true", "generation.metrics=[exact_match,own.py:shorter]"),
    *("generation.prompts=own.jsonl", "generation.prompts_mode=append"),
    *("generation.best_metric=nucleus/num_new_tokens", "generation.best_mode=min"),
)


def write_inputs(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "observer.py").write_text(OBSERVER)
    (directory / "own.py").write_text(METRICS)
    (directory / "own.jsonl").write_text('"Name the capital of France."\n{"prompt": "1+1?", "reference": "2"}\n')


def run(server: TrainerServer, directory: Path, arguments: Sequence[str], **how: Any) -> Run:
    result = server.run(directory, arguments, before=SEED_DRIVER_AND_WORKERS + how.pop("before", ""), **how)
    assert result.returncode == 0, result.output[-3000:] + output_of_workers(result)[-3000:]
    return result


def output_of_workers(result: Run) -> str:
    """Ray would put it among the driver's."""
    return "".join(path.read_text(errors="replace") for path in sorted(result.directory.glob("worker_*.txt")))


def with_answers_that_differ(assets: Assets, directory: Path) -> Assets:
    """The same data, and a model that attends to its prompt: by itself a random one says the same to (nearly) all."""
    model = AutoModelForCausalLM.from_pretrained(assets.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8 if "self_attn" in name else 1)
    shutil.copytree(assets.directory, directory)
    model.save_pretrained(directory / "model")
    return Assets(directory)


def make_ray_runs(server: TrainerServer, directory: Path, assets: Assets) -> RayRuns:
    """
    Args:
        directory: Is there, and gets a folder for each run.
    """
    whole = training(
        assets, "fsdp2", "model.external_lib=observer", "trainer.resume_mode=auto",
        "trainer.logger=[console,file,tensorboard]",
    )  # fmt: skip
    with_generation = [*GENERATION_CONFIG, *whole, *generation(*OF_THE_DRIVER)]
    runs = {}
    for name, arguments in (("on", with_generation), ("off", whole)):
        write_inputs(directory / name)
        runs[name] = run(server, directory / name, arguments)

    write_inputs(directory / "resumed")
    for name in (f"global_step_{STOPPED_AT}", "generations"):
        shutil.copytree(runs["on"].checkpoints / name, directory / "resumed" / "checkpoints" / name)
    (directory / "resumed" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(STOPPED_AT))
    runs["resumed"] = run(server, directory / "resumed", with_generation)

    greedy = generation("generation.do_sample=false")
    beside = ("generation.overlap=true", "generation.every=2")
    offload = ("engine.param_offload=true", "engine.optimizer_offload=true")
    runs["program"] = run(
        server,
        directory / "program",
        [
            *training(assets, "fsdp2", "trainer.test_freq=1", "trainer.save_freq=-1", *offload),
            *(f"+{override}" for override in (*greedy, *beside)),
        ],
        before=ANSWERS_WAIT_FOR_TRAINING,
        program=write_program(directory / "program" / "program.py", PROGRAM, module=RAY),
    )
    lora = ("model.lora_rank=4", "model.lora_alpha=16", "optim.lr=4e-3")
    spread = ("generation.gather=sharded", "generation.ranks=2")
    runs["sharded"] = run(
        server, directory / "sharded", [*GENERATION_CONFIG, *training(assets, "fsdp", *lora), *greedy, *spread]
    )
    often = ("trainer.test_freq=1", "trainer.total_training_steps=5", "trainer.save_freq=-1")
    runs["faulty"] = run(
        server,
        directory / "faulty",
        [*GENERATION_CONFIG, *training(assets, "fsdp", *often), *greedy, "generation.ranks=2"],
        before=FAULTS,
    )
    return RayRuns(**runs)
