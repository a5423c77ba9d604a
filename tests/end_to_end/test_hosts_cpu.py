"""verl's trainers on CPU: what they save, and what is certain to fail."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from checkpoints import read_sharded
from end_to_end.trainer import HAS_ENGINES, MODEL_KEY, VAL_BATCH_SIZE, strategy
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SAVE_CONTENTS = "checkpoint.save_contents" if HAS_ENGINES else "trainer.checkpoint.save_contents"


@pytest.mark.parametrize("num_ranks", [None, 2])
def test_the_saved_hf_model_has_the_trained_parameters(server, tmp_path, assets, num_ranks):
    """With FSDP1, whose offloading torch breaks on CPU; generation is off."""
    overrides = [*assets.overrides(), strategy("fsdp"), f"{SAVE_CONTENTS}=[model,optimizer,extra,hf_model]"]
    result = server.run(tmp_path, overrides, num_ranks=num_ranks)
    assert result.returncode == 0, result.output[-5000:]
    checkpoint = result.checkpoints / "global_step_3"
    saved = load_file(checkpoint / "huggingface" / "model.safetensors")
    trained = read_sharded(checkpoint)
    initial = load_file(assets.model / "model.safetensors")
    assert set(saved) == set(initial) <= set(trained)
    for name, parameter in saved.items():
        assert torch.equal(parameter, trained[name]), name
    assert any(not torch.equal(parameter, initial[name]) for name, parameter in saved.items())


def test_a_certain_crash_at_validation_ends_the_run_before_the_model_is_loaded(server, tmp_path, assets):
    num_rows = 0 if HAS_ENGINES else VAL_BATCH_SIZE - 1
    pd.read_parquet(assets.directory / "multiturn" / "val.parquet").head(num_rows).to_parquet(tmp_path / "few.parquet")
    overrides = [
        *assets.overrides(multiturn=True),
        f"data.val_files={tmp_path}/few.parquet",
        f"{MODEL_KEY}=/no/such/model",
    ]
    result = server.run(tmp_path, overrides, environment={"VERL_MAX_VAL_SAMPLES": "3"}, num_ranks=2)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("verl-valgen: ")]
    assert line.startswith("verl-valgen: data.val_files must have ")
    assert "Traceback" not in result.output
