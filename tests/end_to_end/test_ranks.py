"""verl's own command on two ranks: answers from both, and through the sharded model."""

from __future__ import annotations

import pytest
from checkpoints import assert_greedy_samples, assert_nearly_greedy_samples, plain_model
from end_to_end.trainer import strategy
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

GREEDY = {"VERL_GENERATION_DO_SAMPLE": "false", "VERL_GENERATION_MAX_NEW_TOKENS": "12"}


@pytest.mark.parametrize(
    ("fsdp", "how"),
    [
        ("fsdp2", ("+generation.ranks=2", "+generation.batch_size=2")),
        ("fsdp", ("+generation.gather=sharded", "+generation.max_round_time_s=600")),
    ],
    ids=["spread", "sharded"],
)
def test_two_ranks_answer_as_the_checkpoint_does(server, tmp_path, assets, fsdp, how):
    overrides = [*assets.overrides(), strategy(fsdp), *how]
    result = server.run(tmp_path, overrides, environment=GREEDY, num_ranks=2)
    assert result.returncode == 0, result.output[-5000:]
    assert "samples at this validation" not in result.output  # no round was skipped
    samples, tokenizer = result.samples(3), AutoTokenizer.from_pretrained(assets.model)
    model = plain_model(result.checkpoints / "global_step_3", assets.model)
    assert len(samples) == 5
    if "+generation.gather=sharded" not in how:
        assert_greedy_samples(samples, model, tokenizer, 12)
        return
    assert_nearly_greedy_samples(samples, model, tokenizer)
