#!/usr/bin/env bash
# Answers under several strategies, with metrics, on own prompts too: `config/judging.yaml`, with verl's own command.
# On CPU in well under a minute; the samples, scores and best.json lie in demo/engine-judging/generations.
set -euo pipefail
cd "$(dirname "$0")/../.."

python examples/assets.py --multiturn demo/assets

python -m verl.trainer.sft_trainer --config-path "$PWD/examples/engine/config" --config-name judging
