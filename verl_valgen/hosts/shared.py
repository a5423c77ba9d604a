"""`SharedHost`: what is asked of the process that has the model and of the one that holds the training loop alike."""

from __future__ import annotations

import copy
from abc import ABC
from functools import cached_property

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from verl_valgen.collectives import attempt


class SharedHost(ABC):
    """Known to both, be they one process or two."""

    device: torch.device
    """The device that this process computes on."""
    tokenizer: PreTrainedTokenizerBase
    is_logging_rank: bool
    """Whether this is the rank whose answers are recorded: where ranks run the loop, the one with verl's trackers."""

    @cached_property
    def own_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer for another thread than the trainer's, whose data set may use its own at the same time: while
        one is in use it refuses some calls ("Already borrowed"), and training would end. It is the trainer's where it
        cannot be copied: then there may be no such thread."""
        own, error = attempt(lambda: copy.deepcopy(self.tokenizer))
        return self.tokenizer if error is not None else own

    @property
    def model_config(self) -> PretrainedConfig:
        """transformers' configuration of the model."""
        raise NotImplementedError

    @property
    def generation_config(self) -> GenerationConfig | None:
        """transformers' generation configuration that came with the model."""
        raise NotImplementedError

    def why_not_generating(self) -> str | None:
        """The reason why the model can give no answers, None if it can."""
        raise NotImplementedError
