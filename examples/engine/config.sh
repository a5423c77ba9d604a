#!/usr/bin/env bash
# The second way in: a Hydra configuration of one's own, `config/my_sft.yaml`, with verl's own command.
# On CPU in well under a minute; the samples lie in demo/engine-config/generations.
set -euo pipefail
cd "$(dirname "$0")/../.."

python examples/assets.py --multiturn demo/assets

# Any setting can be changed on the command line, `generation` included.
python -m verl.trainer.sft_trainer \
  --config-path "$PWD/examples/engine/config" --config-name my_sft \
  generation.max_new_tokens=20
