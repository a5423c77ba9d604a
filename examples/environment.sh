#!/usr/bin/env bash
# The first way in: environment variables, with verl's own command and configuration.
# About half a minute on CPU; the samples are written to demo/environment/generations.
set -euo pipefail
source "$(dirname "$0")/trainer.sh"

"$PYTHON" examples/assets.py --multiturn demo/assets

export VERL_GENERATION_TEMPERATURE=1.0
export VERL_GENERATION_TOP_K=50
export VERL_GENERATION_TOP_P=0.7
export VERL_GENERATION_DO_SAMPLE=true
export VERL_GENERATION_MAX_NEW_TOKENS=40
export VERL_MAX_VAL_SAMPLES=5

if [[ $TRAINER == fsdp_sft_trainer ]]; then
  model=(model.partial_pretrain=demo/assets/model data.multiturn.enable=true data.micro_batch_size_per_gpu=16)
else
  model=(model.path=demo/assets/model)
fi

# On several GPUs: torchrun --standalone --nproc-per-node=8 -m verl.trainer.sft_trainer ...
# With Ray:        python -m verl.trainer.sft_trainer_ray trainer.n_gpus_per_node=8 ...
"$PYTHON" -m "verl.trainer.$TRAINER" "${model[@]}" \
  data.train_files=demo/assets/train.parquet \
  data.val_files=demo/assets/val.parquet \
  data.train_batch_size=16 \
  data.max_length=192 \
  optim.lr=1e-3 \
  trainer.total_training_steps=10 \
  trainer.test_freq=5 \
  trainer.logger=[console] \
  trainer.default_local_dir=demo/environment \
  trainer.resume_mode=disable
