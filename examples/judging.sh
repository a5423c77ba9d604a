#!/usr/bin/env bash
# Every prompt is answered under several strategies, own prompts too, and the answers are scored:
# `config/generation/judging.yaml`, with verl's own command.
# Less than a minute on CPU; the samples, their scores and best.json are written to demo/judging/generations.
set -euo pipefail
source "$(dirname "$0")/trainer.sh"

"$PYTHON" examples/assets.py --multiturn demo/assets

"$PYTHON" -m "verl.trainer.$TRAINER" \
  --config-path "$PWD/examples/config" --config-name "my_${TRAINER%_ray}" \
  +generation=judging \
  trainer.test_freq=2 \
  trainer.default_local_dir=demo/judging
