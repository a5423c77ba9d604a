#!/usr/bin/env bash
# The second way in: a Hydra configuration of your own, `config/my_<trainer>.yaml`, with verl's own command.
# About half a minute on CPU; the samples are written to demo/config/generations.
set -euo pipefail
source "$(dirname "$0")/trainer.sh"

"$PYTHON" examples/assets.py --multiturn demo/assets

# Any setting can be changed on the command line, `generation` included.
"$PYTHON" -m "verl.trainer.$TRAINER" \
  --config-path "$PWD/examples/config" --config-name "my_${TRAINER%_ray}" \
  trainer.default_local_dir=demo/config \
  generation.max_new_tokens=20
