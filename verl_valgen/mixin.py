"""`ValidationGenerationMixin`: the trainer that answers its validation prompts.

It only ties verl's trainer to a `ValidationRounds`; `fit()` is verl's own.
"""

from __future__ import annotations

from typing import Any

from verl_valgen.hosts import host_class_for
from verl_valgen.rounds.preflight import Preflight, preflight
from verl_valgen.rounds.rounds import ValidationRounds


class ValidationGenerationMixin:
    """Goes before one of verl's SFT trainers: `class MyTrainer(ValidationGenerationMixin, FSDPSFTTrainer)`.

    `fit()` records samples at every validation when generation is enabled; `generate_samples` works at any time after
    construction.

    Raises:
        ConfigError: The configuration is wrong; before the model is loaded.
        TypeError: The class behind the mixin is none of verl's trainers that are known here.
    """

    _preflight: Preflight | None = None
    """The checked configuration, while `run_sft` or verl's own command runs."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        host_class, module = host_class_for(type(self))
        checked = self._preflight
        if checked is None or not checked.still_holds(config):  # a trainer that a program constructs by itself
            checked = preflight(config)
        with host_class.while_building(module):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self._rounds = ValidationRounds(host_class(self), checked.settings, checked.file_prompts)

    def fit(self) -> Any:
        with self._rounds, self._rounds.told_if_missing():
            return super().fit()  # type: ignore[misc]

    def generate_samples(self, batch: Any) -> tuple[list[str], list[str]]:
        """Answers the prompts of a batch of the validation loader. Collective: all ranks must call.

        With Ray it is a call in the driver, and in it alone.

        Args:
            batch: Every rank passes its own, rank 0's is used: a dict or TensorDict with `input_ids`, `attention_mask`
                and `loss_mask`, (B, L) int64 each, or nested tensors. Without `loss_mask` all is prompt.

        Returns:
            (prompts, generations) in batch order on rank 0, ([], []) elsewhere, as the fields `prompt` and
            `generation` of a record. Samples with images or videos (`multi_modal_inputs`) are left out, with a warning.
        """
        return self._rounds.generate_samples(batch)
