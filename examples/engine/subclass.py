"""The third way in: a trainer of one's own, which can ask the model whenever it likes (verl 0.7.1 and later).

On CPU in well under a minute; the samples lie in `demo/engine-subclass/generations`. From the root of the repository:

    python examples/assets.py --multiturn demo/assets
    python examples/engine/subclass.py
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig
from verl.trainer.sft_trainer import SFTTrainer

from verl_valgen import ValidationGenerationMixin, run_sft
from verl_valgen.text import printable


class MyTrainer(ValidationGenerationMixin, SFTTrainer):
    """verl's trainer, which also shows what the model says before it has learned anything."""

    def fit(self) -> None:
        batch = next(iter(self.val_dataloader))
        # All ranks must call; the first one gets the texts, the others empty lists.
        prompts, generations = self.generate_samples(batch)
        for prompt, generation in zip(prompts[:4], generations[:4], strict=True):
            print(f"Before training: {printable(prompt)} -> {printable(generation)}")
        super().fit()


@hydra.main(config_path="config", config_name="subclass", version_base=None)
def main(config: DictConfig) -> None:
    run_sft(config, MyTrainer)


if __name__ == "__main__":
    main()
