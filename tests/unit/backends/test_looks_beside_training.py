"""Few steps wait for the device at once while training goes on, whose kernels may have to wait behind them."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import tiny_model
from verification import GREEDY, SEED, some_requests

from verl_valgen.backends.base import Limits
from verl_valgen.backends.fast.backend import FastBackend
from verl_valgen.backends.fast.step import Decoder


@pytest.mark.parametrize(("is_beside_training", "num_steps"), [(False, 4), (True, 2)])
def test_how_many_steps_are_taken_from_one_look_to_the_next(monkeypatch, is_beside_training, num_steps):
    steps, looks = [], []
    step, look = Decoder.step, Decoder.look
    monkeypatch.setattr(Decoder, "step", lambda self, *args: (steps.append(1), step(self, *args))[1])
    monkeypatch.setattr(Decoder, "look", lambda self, *args: (looks.append(len(steps)), look(self, *args))[1])
    model, _ = tiny_model("llama", "wide")
    backend = FastBackend(model, None, SEED, Limits(batch_size=4))  # type: ignore[arg-type]
    requests = some_requests(4, GREEDY, 16, seed=1)
    with torch.no_grad():
        if is_beside_training:
            backend.make_ready(requests)
        backend.generate(requests)
    assert max(after - before for before, after in itertools.pairwise(looks)) == num_steps
