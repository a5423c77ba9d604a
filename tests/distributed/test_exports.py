"""Engines export together, and some leave merged weights in the trainer until all is taken: every rank takes all."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.testing import run_distributed
from exports import by_expert
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from verl_valgen.collectives import agree
from verl_valgen.weights.empty import empty_from_config
from verl_valgen.weights.exported import ExportedCopy
from verl_valgen.weights.gather import collect

CPU = torch.device("cpu")
CONFIG = Qwen3MoeConfig(
    vocab_size=37, hidden_size=16, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=2, num_experts=3,
    num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
)  # fmt: skip


class Exporter:
    """Sums what its ranks have, a tensor at a time, while the trainer's weights are not the trainer's."""

    def __init__(self, fault: str) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(CONFIG)
        self.is_faulty = dist.is_initialized() and dist.get_rank() == 1
        self.fault = fault if self.is_faulty or not dist.is_initialized() else ""
        self.is_merged, self.was_asked, self.num_given = False, False, 0

    def parameters(self, _: set[str]) -> Generator[tuple[str, Tensor], None, None]:
        self.was_asked = True
        if self.fault == "refuses":
            raise OSError("planted")
        return self._export()

    def _export(self) -> Generator[tuple[str, Tensor], None, None]:
        self.is_merged = True
        try:
            for name, tensor in by_expert(self.model.state_dict().items()):
                part = tensor.detach() / (dist.get_world_size() if dist.is_initialized() else 1)
                if dist.is_initialized():
                    dist.all_reduce(part)
                self.num_given += 1
                yield name.replace("1.up_proj", "1.upp_proj") if self.fault == "no place" else name, part
        finally:
            self.is_merged = False

    def new_copy(self) -> ExportedCopy:
        if self.fault == "prepare":
            raise MemoryError("planted")
        return FaultyCopy(empty_from_config(AutoModelForCausalLM, CONFIG, torch.float32), self.fault)


class FaultyCopy(ExportedCopy):
    def __init__(self, model: Any, fault: str) -> None:
        super().__init__(model, CPU, exporter="Exporter")
        self.fault = fault

    def receive(self, name: str, parameter: Tensor) -> None:
        if "layers.1.mlp.experts.1" in name and self.fault == "memory":
            raise torch.OutOfMemoryError("planted")
        if "layers.1.mlp.experts.1" in name and self.fault == "interrupt":
            raise KeyboardInterrupt
        if "layers.1.mlp.experts.1" in name and self.fault == "missing":
            return
        super().receive(name, parameter)


def export_with(fault: str) -> tuple[str, bool, bool, int, bool]:
    exporter = Exporter(fault)
    try:
        model = collect(exporter.parameters, exporter.new_copy, dtype=torch.float32, device=CPU, keep=True)
        expected = exporter.model.state_dict()
        outcome = "nothing" if model is None else "different"
        if model is not None and all(torch.equal(t, expected[name]) for name, t in model.state_dict().items()):
            outcome = "the model"
    except Exception as e:
        outcome = f"{type(e).__name__}: {e}"
    return outcome, exporter.was_asked, exporter.is_merged, exporter.num_given, agree(True, CPU)


FAULTS = ("", "no place", "memory", "missing", "refuses", "prepare")


def export_with_faults() -> dict[str, Any]:
    return {fault: export_with(fault) for fault in FAULTS}


def test_every_rank_takes_all_that_is_exported_whatever_fails_on_one(tmp_path: Path):
    right, faulty = run_distributed(export_with_faults, 2, tmp_path)
    num = len(list(by_expert(AutoModelForCausalLM.from_config(CONFIG).state_dict().items())))
    assert num > 2 * 3 * 3
    for fault in ("", "no place", "memory", "missing"):
        assert right[fault] == ("the model", True, False, num, True), fault
        assert faulty[fault][1:] == (True, False, num, True), fault
    assert faulty[""][0] == "the model"
    assert "upp_proj.weight, which has no place in Qwen3MoeForCausalLM; the nearest" in faulty["no place"][0]
    assert faulty["memory"][0] == "OutOfMemoryError: planted"
    assert "RuntimeError: Exporter did not export" in faulty["missing"][0]
    # Nothing is begun that not all ranks can end.
    assert right["refuses"] == ("nothing", True, False, 0, True)
    assert faulty["refuses"] == ("OSError: planted", True, False, 0, True)
    assert right["prepare"] == ("nothing", False, False, 0, True)
    assert faulty["prepare"] == ("MemoryError: planted", False, False, 0, True)


def test_an_export_that_is_broken_off_is_closed():
    exporter = Exporter("interrupt")
    with pytest.raises(KeyboardInterrupt):
        collect(exporter.parameters, exporter.new_copy, dtype=torch.float32, device=CPU, keep=True)
    assert (exporter.is_merged, exporter.num_given > 0) == (False, True)
