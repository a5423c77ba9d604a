"""Training goes on while a round is answered, on verl's real trainer."""

from __future__ import annotations

import re

import pytest
from end_to_end.trainer import GENERATION_CONFIG, HAS_ENGINES, Run, strategy
from same_training import SEED_AND_REPORT

pytestmark = pytest.mark.slow

BESIDE, LAST = (2, 4), 5
OVERLAP = "generation.overlap=true"

ANSWERS_WAIT_FOR_TRAINING = """
import threading
from collections import defaultdict
from verl_valgen.backends.hf import HFBackend
from verl_valgen.hosts.loaders import CountingLoader, NotifyingLoader

def hold_answers():
    trained = defaultdict(threading.Event)  # by step
    generate, train, validate = HFBackend.generate, CountingLoader.__iter__, NotifyingLoader.__iter__
    loaders = []

    def answer(self, requests):
        if threading.current_thread() is not threading.main_thread():
            step = loaders[0].count
            assert trained[step + 1].wait(100), "training is held"
            print(f"answers of step {step} after a step of training", flush=True)
        return generate(self, requests)

    def train_and_tell(self):
        loaders[:] = [self]
        for batch in train(self):
            yield batch
            trained[self.count].set()  # all that is done with the batch

    def tell_and_validate(self):
        trained[loaders[0].count].set()
        yield from validate(self)

    HFBackend.generate, CountingLoader.__iter__, NotifyingLoader.__iter__ = answer, train_and_tell, tell_and_validate

hold_answers()
"""
"""What is beside training begins only when the step after its validation has been trained: if training waited for
answers, both would wait."""


def train(server, directory, assets, num_ranks: int, fsdp: str, *generation: str, before: str = "") -> Run:
    result = server.run(
        directory,
        [
            *GENERATION_CONFIG, *assets.overrides(), strategy(fsdp), *generation, "generation.max_new_tokens=8",
            f"trainer.total_training_steps={LAST}",
        ],
        num_ranks=num_ranks,
        before=SEED_AND_REPORT + before,
    )  # fmt: skip
    assert result.returncode == 0, result.output[-5000:]
    return result


@pytest.mark.parametrize(("num_ranks", "fsdp"), [(1, "fsdp"), (2, "fsdp2")])
def test_training_goes_on_and_every_round_is_recorded_with_its_step(server, tmp_path, assets, num_ranks, fsdp):
    on = train(server, tmp_path / "on", assets, num_ranks, fsdp, OVERLAP, before=ANSWERS_WAIT_FOR_TRAINING)
    beside = re.findall(r"answers of step (\d+) after a step of training", on.stdout)
    assert beside == [str(step) for step in BESIDE]
    assert on.warnings_but_late == []
    for step in (*BESIDE, LAST):
        assert {(sample["step"], sample["verified"]) for sample in on.samples(step)} == {(step, True)}
        assert f"=== Validation Samples (Step {step}) ===" in on.stdout
    if num_ranks > 1:
        return
    off = train(server, tmp_path / "off", assets, num_ranks, fsdp)
    assert off.warnings == []
    for step in (*BESIDE, LAST):
        assert on.samples(step) == off.samples(step)
    first, last = ([sample["generation"] for sample in off.samples(step)] for step in (BESIDE[0], LAST))
    assert first != last, "the weights of another step would give other answers"
    for key in ("train/loss", "val/loss", *(["train/grad_norm"] if HAS_ENGINES else [])):
        assert on.logged(key) == off.logged(key) != []
