# Sourced by the examples: which of verl's trainers they start, and with which Python.
#
#   TRAINER=fsdp_sft_trainer bash examples/environment.sh    # verl 0.5.0 to 0.7.0
#   TRAINER=sft_trainer bash examples/environment.sh         # verl 0.6.0 and later
#   TRAINER=sft_trainer_ray bash examples/environment.sh     # verl 0.7.0 and later; a minute more on CPU, for Ray itself
#
# Unless it is set, PYTHON is that of the checkout's environment for this trainer (`make install` makes them), and without
# one `python3`. Unless it is set, TRAINER is what that Python's verl has: the first in this list.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  for environment in .venv-engine:sft_trainer .venv-fsdp-sft:fsdp_sft_trainer; do
    if [[ -x ${environment%:*}/bin/python && ${TRAINER:-${environment#*:}} == "${environment#*:}"?(_ray) ]]; then
      PYTHON=${environment%:*}/bin/python
      break
    fi
  done
fi
TRAINER=$(TRAINER=${TRAINER:-} "$PYTHON" examples/trainer.py)
echo "verl.trainer.$TRAINER with $PYTHON"
