"""What is gathered in one collective stays within the memory that is promised."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from verl_valgen.weights import dtensors


def test_batches_count_what_shards_are_padded_by(monkeypatch):
    """Of a tensor with fewer rows than there are ranks each sends a whole row: LoRA's matrices on many ranks."""
    shares = dtensors._Shares(SimpleNamespace(size=lambda dim: 4), 0)
    monkeypatch.setattr(dtensors, "_shares", lambda parameter: shares)
    shapes = [(16, 1024), *[(1, 1024)] * 20, (4, 3)]
    wanted = [dtensors.Wanted(str(i), torch.empty(shape), torch.float32) for i, shape in enumerate(shapes)]
    most_bytes = 8 * 1024 * 4
    batches = [batch for _, batch in dtensors._batches(wanted, most_bytes)]
    assert [one.name for batch in batches for one in batch] == [one.name for one in wanted]
    assert [len(batch) for batch in batches] == [1, *[2] * 10, 1]
    for batch in batches[1:]:
        assert sum(4 * shares.num_bytes(one) for one in batch) <= most_bytes
