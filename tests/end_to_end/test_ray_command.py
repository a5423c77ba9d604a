"""verl's own command with Ray itself: what forked workers cannot show."""

from __future__ import annotations

import pytest
from checkpoints import assert_greedy_samples, plain_model
from end_to_end.clusters import own_cluster
from end_to_end.trainer import HAS_ENGINES, HAS_RAY, RAY, run, strategy
from transformers import AutoTokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(not (HAS_RAY and HAS_ENGINES), reason="this verl has no verl.trainer.sft_trainer_ray"),
]

MAX_NEW_TOKENS = 6
GREEDY = {
    "VERL_GENERATION_DO_SAMPLE": "false", "VERL_GENERATION_MAX_NEW_TOKENS": str(MAX_NEW_TOKENS),
    "VERL_MAX_VAL_SAMPLES": "3",
}  # fmt: skip


def test_verls_own_command_starts_rays_workers_and_leaves_none(tmp_path, assets):
    overrides = [
        *assets.overrides(), strategy("fsdp2"), "trainer.n_gpus_per_node=2", "trainer.total_training_steps=2",
        "trainer.test_freq=1",
    ]  # fmt: skip
    with own_cluster() as cluster:
        result = run(tmp_path, overrides, environment=GREEDY | cluster.environment, module=RAY)
        assert result.returncode == 0, result.output[-5000:]
        assert cluster.left_over() == []
    assert result.warnings_but_late == []
    assert "3 samples at steps 1 and 2, in checkpoints/generations" in result.output
    for step in (1, 2):
        samples = result.samples(step)
        assert [(sample["row"], sample["verified"]) for sample in samples] == [(0, True), (1, True), (2, True)]
        assert f"=== Validation Samples (Step {step}) ===" in result.stdout
    model = plain_model(result.checkpoints / "global_step_2", assets.model)
    assert_greedy_samples(result.samples(2), model, AutoTokenizer.from_pretrained(assets.model), MAX_NEW_TOKENS)
