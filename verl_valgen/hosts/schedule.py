"""The steps at which verl's `fit()` will validate, worked out before it runs from the numbers that decide it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The numbers by which verl's loop decides when to validate, and this package when to generate."""

    start_step: int
    """The step that the run resumes from, 0 for a new one."""
    available_steps: int
    """The step that the data suffices for: that of a run's last batch."""
    total_training_steps: int
    """The step at which verl validates and exits: that of all epochs unless configured; beyond `available_steps` where
    a restored loader gives less."""
    test_freq: int
    """Validations come every `test_freq` steps and before the exit; with 0 or less, only before the exit."""
    every: int = 1
    """Rounds come at every `every`-th validation, counted from step 0, and at the last."""
    before_train: bool = False
    """Whether there is also a round at the step that the run starts from."""
    lost_steps: int = 0
    """The steps of an epoch in which verl's loader gives nothing: restored at an epoch's end, it is exhausted."""

    def validation_steps(self) -> list[int]:
        """The steps after which verl validates, in ascending order."""
        exit_step = max(self.total_training_steps, self.start_step + 1)
        last_step = min(exit_step, self.available_steps)
        steps: set[int] = set()
        if self.test_freq > 0:
            first = (self.start_step // self.test_freq + 1) * self.test_freq
            steps.update(range(first, last_step + 1, self.test_freq))
        if self.start_step < exit_step <= self.available_steps:
            steps.add(exit_step)
        return sorted(steps)

    def round_steps(self) -> list[int]:
        """The steps at which there is a round of generation, in ascending order."""
        steps = self.validation_steps()
        chosen = [step for step in steps if step == steps[-1] or step // self.test_freq % self.every == 0]
        begins = self.start_step < self.available_steps or self.lost_steps > 0
        return [self.start_step, *chosen] if self.before_train and begins else chosen

    @property
    def shortfall(self) -> str | None:
        """Why training will end before its last step, in words; None unless verl's loader is to blame."""
        if not self.lost_steps or self.available_steps >= self.total_training_steps:
            return None
        return (
            "the run resumes at the end of an epoch, and verl's restored data loader gives no batch in the next one, "
            f"so that training ends at step {self.available_steps} and not at {self.total_training_steps}"
        )

    def __str__(self) -> str:
        """The steps of the rounds in words, or why there is none."""
        steps = self.round_steps()
        if not steps:
            if self.shortfall is not None:
                return f"at no step: {self.shortfall}"
            if self.start_step >= self.available_steps:
                return f"at no step: step {self.start_step}, from which the run resumes, is the last one of the data"
            return (
                f"at no step: trainer.test_freq is {self.test_freq}, and step {self.total_training_steps} "
                f"(trainer.total_training_steps) lies beyond the data's {self.available_steps} steps"
            )
        if len(steps) == 1:
            which = "the last one" if steps[0] > self.start_step else "before training"
            only = f"at step {steps[0]} only"
            return only if self.test_freq > 0 else f"{only}, {which} (trainer.test_freq is {self.test_freq})"
        shown = [str(step) for step in steps]
        if len(steps) > 4:
            shown[2:-1] = ["..."]
        return f"at steps {', '.join(shown[:-1])} and {shown[-1]}"
