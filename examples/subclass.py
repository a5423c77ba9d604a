"""The third way in: a trainer of your own, which can ask the model whenever you like.

About half a minute on CPU; the samples are written to `demo/subclass/generations`. From the root of the repository,
after `make install`:

    .venv-engine/bin/python examples/assets.py --multiturn demo/assets
    .venv-engine/bin/python examples/subclass.py
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig
from trainer import choose_trainer

from verl_valgen import ValidationGenerationMixin, run_sft
from verl_valgen.text import printable

TRAINER = choose_trainer()
if TRAINER == "fsdp_sft_trainer":
    from verl.trainer.fsdp_sft_trainer import FSDPSFTTrainer as Trainer
elif TRAINER == "sft_trainer_ray":
    from verl.trainer.sft_trainer_ray import SFTTrainer as Trainer
else:
    from verl.trainer.sft_trainer import SFTTrainer as Trainer


class MyTrainer(ValidationGenerationMixin, Trainer):
    """verl's trainer, which also shows what the model says before it has learned anything."""

    def fit(self) -> None:
        batch = next(iter(self.val_dataloader))
        # All ranks must call; the first one gets the texts, the others empty lists. (With Ray the driver alone calls.)
        prompts, generations = self.generate_samples(batch)
        for prompt, generation in zip(prompts[:4], generations[:4], strict=True):
            print(f"Before training: {printable(prompt)} -> {printable(generation)}")
        super().fit()


@hydra.main(config_path="config", config_name=f"my_{TRAINER.removesuffix('_ray')}", version_base=None)
def main(config: DictConfig) -> None:
    config.trainer.default_local_dir = "demo/subclass"
    run_sft(config, MyTrainer)


if __name__ == "__main__":
    main()
