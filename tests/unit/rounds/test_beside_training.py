"""The thread beside training, and the memory that training leaves."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_valgen.hosts.trainer_host import TrainerHost
from verl_valgen.rounds.local import LocalAnswerer
from verl_valgen.rounds.overlap import BesideTraining, TrainingMemory, on_own_stream
from verl_valgen.rounds.proven import ProvenAnswerer
from verl_valgen.rounds.reading import Finding
from verl_valgen.rounds.rounds import RoundUnderWay, ValidationRounds
from verl_valgen.settings.load import GenerationSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Weights:
    """What a job holds."""


def test_the_job_runs_without_gradients_and_the_trainer_goes_on_with_them():
    began, may_end = threading.Event(), threading.Event()

    def job() -> bool:
        began.set()
        assert may_end.wait(60)
        return torch.is_grad_enabled()

    beside = BesideTraining(job, CPU)
    assert began.wait(60)
    assert torch.is_grad_enabled()
    assert not beside.is_done
    may_end.set()
    assert beside.result() == (False, None)
    assert beside.is_done


@pytest.mark.parametrize("planted", [ValueError("planted"), SystemExit(3), KeyboardInterrupt()], ids=type)
def test_what_a_job_raises_is_a_value(planted):
    def job() -> None:
        raise planted

    value, error = BesideTraining(job, CPU).result()
    assert value is None
    assert isinstance(error, Exception)


def test_what_a_job_holds_is_let_go_of_on_the_thread_that_asks_for_its_result():
    weights, freed_on = Weights(), []
    weakref.finalize(weights, lambda: freed_on.append(threading.current_thread()))
    beside = BesideTraining(lambda held=weights: None, CPU)
    del weights
    assert beside.wait(60)
    beside._thread.join()
    gc.collect()
    assert freed_on == []
    beside.result()
    assert freed_on == [threading.main_thread()]


def test_a_loop_that_never_ends_can_be_ended():
    began = threading.Event()

    def job() -> None:
        while True:
            began.set()

    beside = BesideTraining(job, CPU)
    assert began.wait(60)
    beside.stop()
    assert beside.wait(60)
    assert isinstance(beside.result()[1], RuntimeError)


def gradient(job: Callable[[], Any] | None) -> torch.Tensor:
    """Of a weight that a forward pass uses twice, with a job beside it in between."""
    torch.manual_seed(0)
    layer, states = torch.nn.Linear(64, 64), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        states = layer(states)
        if job is not None:
            assert BesideTraining(job, CPU).result()[1] is None
        states = layer(states)
    states.float().square().sum().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad


@pytest.mark.parametrize("blocks", [1, 2], ids=["one block", "one within another"])
def test_the_cast_weights_of_a_forward_pass_beside_it_stay(blocks):
    def job() -> None:
        with ExitStack() as stack:  # as rotary embeddings in transformers have it
            for _ in range(blocks):
                stack.enter_context(torch.autocast("cpu", enabled=False))

    assert torch.equal(gradient(job), gradient(None))
    assert not torch.is_autocast_enabled("cpu")


def test_without_cuda_there_are_no_streams_and_memory_is_not_counted():
    with on_own_stream(CPU):
        memory = TrainingMemory(CPU)
    memory.before_gather()
    memory.begin_holding()
    assert (memory.held, memory.free_bytes()) == (0, float("inf"))


def free_bytes() -> float:
    return 1e9


class Device:
    """What PyTorch says of a device, in GiB."""

    total, allocated, reserved, peak = 80, 30, 40, 50

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def replace(name, value):
            monkeypatch.setattr(torch.cuda, name, lambda device: value() * 2**30)

        replace("max_memory_allocated", lambda: self.peak)
        replace("memory_allocated", lambda: self.allocated)
        replace("memory_reserved", lambda: self.reserved)
        free = lambda device: ((self.total - self.reserved) * 2**30, self.total * 2**30)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "mem_get_info", free)


def test_what_is_free_beside_the_highest_level_of_training(monkeypatch):
    device, memory = Device(monkeypatch), TrainingMemory(CUDA)

    def free() -> float:
        memory.note()
        return memory.free_bytes() / 2**30

    assert free() == 80 - 50 - 1
    device.reserved = 75  # what the allocator keeps can be had
    assert free() == 80 - 50 - 1
    device.peak = 20  # the trainer has reset it
    assert free() == 80 - 50 - 1
    device.peak = 60
    assert free() == 80 - 60 - 1
    memory.before_gather()
    device.allocated += 10
    memory.begin_holding()
    device.peak = 70  # training beside 10 GiB of a round
    assert free() == 80 - 60 - 1
    device.peak = 73
    assert free() == 80 - 63 - 1
    device.peak = 75  # since the last training batch
    memory.end_holding()
    assert free() == 80 - 65 - 1
    device.peak = 90
    assert free() == 0


class RoundsOfAGPU(ValidationRounds):
    """Rounds whose memory is the device's, on one rank."""

    def __init__(self) -> None:
        host: Any = SimpleNamespace(
            device=CPU, is_logging_rank=False, generation_config=None, tokenizer=None, own_tokenizer=None,
            answerer=TrainerHost.answerer, fatal_errors=(),
        )  # fmt: skip
        super().__init__(host, GenerationSettings(enabled=True, overlap=True))
        local: Any = self.answerer
        self.local: LocalAnswerer = local
        self.memory = self.local.memory = TrainingMemory(CUDA)
        self.memory._allocated = 30 * 2**30

    def level(self) -> float:
        self.memory.note()
        return self.memory.level / 2**30


def ask_in_a_round(rounds: ValidationRounds) -> None:
    rounds.run(1)


def ask_for_samples(rounds: ValidationRounds) -> None:
    rounds.generate_samples({})


@pytest.mark.parametrize("ask", [ask_in_a_round, ask_for_samples])
def test_the_peak_of_a_round_that_training_waits_for_is_none_of_training(monkeypatch, ask):
    device, rounds = Device(monkeypatch), RoundsOfAGPU()

    def begin(*args: Any, **kwargs: Any) -> None:
        device.peak += 10

    monkeypatch.setattr(rounds.answerer, "begin", begin)
    device.peak = 40
    ask(rounds)
    assert rounds.level() == 50  # before the first step nothing else is known
    rounds.at_batch()
    device.peak = 60
    ask(rounds)
    assert rounds.level() == 60
    device.peak = 75
    rounds.at_batch()
    assert rounds.level() == 75


@pytest.mark.parametrize("ends", [True, False], ids=["done", "never done"])
def test_what_a_round_held_is_held_no_longer(monkeypatch, ends):
    device, rounds = Device(monkeypatch), RoundsOfAGPU()
    freed: list[int] = []
    answers = SimpleNamespace(
        is_done=False, stop=lambda: None, wait=lambda timeout_s: ends, result=lambda: (None, RuntimeError("stopped"))
    )
    gathered = SimpleNamespace(discard=lambda: freed.append(rounds.memory.held))
    rounds.under_way = RoundUnderWay(SimpleNamespace(step=1), gathered, answers)  # type: ignore[arg-type]
    device.allocated += 10
    rounds.memory.begin_holding()
    rounds.local.is_holding = True
    device.peak = 70  # beside it, since the last training batch
    rounds._abandon()
    assert rounds.under_way is None
    assert freed == [0] * ends
    assert (rounds.memory.held, rounds.level()) == (0, 60)


@pytest.mark.parametrize(
    ("device_type", "gather", "own_tokenizer", "reason"),
    [
        ("xpu", "auto", "a copy", "beside training nobody has tried devices of type xpu"),
        ("cpu", "sharded", "a copy", "the model that is trained answers itself"),
        ("cpu", "auto", None, "the tokenizer, which the data set uses meanwhile, cannot be copied"),
        ("cpu", "auto", "a copy", None),
    ],
)
def test_where_training_waits_that_is_said_once(monkeypatch, caplog, device_type, gather, own_tokenizer, reason):
    caplog.set_level(logging.INFO, "verl_valgen")
    host: Any = SimpleNamespace(
        device=torch.device(device_type),
        is_logging_rank=True,
        generation_config=None,
        tokenizer=None,
        own_tokenizer=own_tokenizer,
    )
    answerer = ProvenAnswerer(host, GenerationSettings(enabled=True, overlap=True, gather=gather))
    begun: list[Any] = []
    monkeypatch.setattr(answerer.answerer, "begin", lambda *args: begun.append(args[-1]))
    for _ in range(2):
        answerer.begin([], free_bytes)
    assert begun == [free_bytes if reason is None else None] * 2
    told = [] if reason is None else [f"generation.overlap: training waits for the answers: {reason}"]
    assert [record.getMessage() for record in caplog.records] == told


def test_a_copy_that_is_not_compared_is_told_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "verl_valgen")
    host: Any = SimpleNamespace(device=CPU, is_logging_rank=True, generation_config=None, tokenizer=None)
    answerer = ProvenAnswerer(host, GenerationSettings(enabled=True, overlap=True))
    monkeypatch.setattr(answerer, "_safer", lambda gathered: [])
    monkeypatch.setattr(answerer, "_reading", lambda gathered: None)
    monkeypatch.setattr("verl_valgen.rounds.proven.texts_to_read", lambda *args: [])
    monkeypatch.setattr("verl_valgen.rounds.proven.first_link", lambda *args: Finding(None, "no row"))
    gathered: Any = None
    assert [answerer.may_go_on(gathered, []) for _ in range(2)] == [True, True]
    (record,) = caplog.records
    assert record.getMessage().endswith("stay without proof: no row")
