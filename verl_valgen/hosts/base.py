"""`Host`: a trainer of verl's whose every rank has a part of the model and runs the training loop."""

from __future__ import annotations

from verl_valgen.hosts.model_host import ModelHost, current_device, has_experts
from verl_valgen.hosts.trainer_host import TrainerHost, flash_attn_works

__all__ = ["Host", "ModelHost", "TrainerHost", "current_device", "flash_attn_works", "has_experts"]


class Host(ModelHost, TrainerHost):
    """Both in one process."""
