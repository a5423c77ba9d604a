"""`sft_trainer_ray` with `generation.backend=vllm`: its workers hold the model together. They are forks, not Ray's."""

from __future__ import annotations

from checkpoints import assert_greedy_samples, plain_model
from end_to_end.ray_runs import NUM_WORKERS, output_of_workers, run
from end_to_end.trainer import GENERATION_CONFIG, strategy
from transformers import AutoTokenizer
from vllm_runs import GREEDY, MAX_NEW_TOKENS, NUM_ROWS, STEPS, STOPPED_AT, VLLM


def test_workers_answer_with_vllm_and_training_is_the_same(ray_server, tmp_path, assets):
    training = [
        *assets.overrides(), strategy("fsdp2"), f"trainer.n_gpus_per_node={NUM_WORKERS}", "optim.lr=3e-4",
        f"trainer.total_training_steps={STEPS}", "trainer.test_freq=2", f"trainer.save_freq={STOPPED_AT}",
    ]  # fmt: skip
    generation = [
        VLLM, GREEDY, f"generation.tensor_parallel={NUM_WORKERS}", f"generation.max_new_tokens={MAX_NEW_TOKENS}",
        f"trainer.max_val_samples={NUM_ROWS}",
    ]  # fmt: skip
    on = run(ray_server, tmp_path / "on", [*GENERATION_CONFIG, *training, *generation])
    off = run(ray_server, tmp_path / "off", training)
    assert on.warnings_but_late == []
    assert "generation.backend=vllm" not in output_of_workers(on)
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    for step in (STOPPED_AT, STEPS):
        samples = on.samples(step)
        assert len(samples) == NUM_ROWS
        assert all(sample["verified"] is True for sample in samples)
        model = plain_model(on.checkpoints / f"global_step_{step}", assets.model)
        assert_greedy_samples(samples, model, tokenizer, MAX_NEW_TOKENS)
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert on.logged(key) == off.logged(key) != []
