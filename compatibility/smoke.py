"""One run of the installed verl's trainer on CPU, held against a plain model.

The interpreter of a release's environment executes it, with `tests` and `examples` on PYTHONPATH. The last line of its
output is JSON: null, or the reason in one line for which the samples are not as they should be.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import assets as small
from checkpoints import plain_greedy, plain_model
from end_to_end.clusters import own_cluster
from end_to_end.trainer import RAY, VERL_MODULE, Assets, Run, run, strategy
from reasons import last_exception, last_warning
from transformers import AutoTokenizer

from verl_valgen.prompts.tokens import Decoder

NUM_RANKS = 2
STEPS = (2, 3)  # of the validations in a run of `Assets.overrides`; its checkpoint is that of the last
NUM_SAMPLES = 5
MAX_NEW_TOKENS = 12
GENERATION = {
    "VERL_GENERATION_DO_SAMPLE": "false",
    "VERL_GENERATION_MAX_NEW_TOKENS": str(MAX_NEW_TOKENS),
    "VERL_MAX_VAL_SAMPLES": str(NUM_SAMPLES),
}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "bias": "none", "task_type": "CAUSAL_LM"}


def smoke(directory: Path, strategy_name: str, lora: bool, stubs: Path | None) -> str | None:
    """Train in `directory`; the reason for which the samples are not as they should be, None where they are.

    Args:
        strategy_name: `fsdp` or `fsdp2`.
        stubs: Folder of modules in place of packages that cannot be installed.
    """
    assets = write_assets(directory / "assets")
    arguments = [*assets.overrides(), strategy(strategy_name)]
    if lora:
        arguments += [f"model.lora_rank={LORA['r']}", f"model.lora_alpha={LORA['lora_alpha']}"]
    # PYTHONPATH: nothing of the tests is within the trainer's reach.
    environment = GENERATION | {"PYTHONPATH": str(stubs or ""), "CUDA_VISIBLE_DEVICES": "", "HYDRA_FULL_ERROR": "1"}
    if VERL_MODULE == RAY:
        arguments += [f"trainer.n_gpus_per_node={NUM_RANKS}"]
        with own_cluster() as cluster:
            result = run(directory / "run", arguments, environment=environment | cluster.environment)
    else:
        result = run(directory / "run", arguments, environment=environment, num_ranks=NUM_RANKS)
    if result.returncode != 0:
        return last_exception(result.stderr) or f"exit status {result.returncode}"
    for step in STEPS:
        if not (result.generations / f"step_{step:08d}.jsonl").exists():
            return f"no samples at step {step}; {last_warning(result.output) or 'no warning says why'}"
        if len(result.samples(step)) != NUM_SAMPLES:
            return f"{len(result.samples(step))} samples instead of {NUM_SAMPLES} at step {step}"
    return difference(result, assets, lora)


def write_assets(directory: Path) -> Assets:
    """The model and the data of the end-to-end tests."""
    small.write_model(directory / "model", hidden_size=32, intermediate_size=64)
    for kind in ("singleturn", "multiturn"):
        small.write_questions(directory / kind, num_train=40, num_val=20, multiturn=kind == "multiturn")
    return Assets(directory)


def difference(result: Run, assets: Assets, lora: bool) -> str | None:
    """Where the last samples differ from what a plain model of the checkpoint says, None where they do not."""
    step = STEPS[-1]
    model = plain_model(result.checkpoints / f"global_step_{step}", assets.model, LORA if lora else None)
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    for sample in result.samples(step):
        prompt_ids = tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]
        output_ids = plain_greedy(model, prompt_ids, MAX_NEW_TOKENS)
        text = Decoder(tokenizer).answer(output_ids)
        if (sample["generation"], sample["num_new_tokens"]) != (text, len(output_ids)):
            return f"sample {sample['index']}: {sample['generation']!r} instead of {text!r}"
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="for the run; what is there is removed")
    parser.add_argument("strategy", choices=("fsdp", "fsdp2"))
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--stubs", type=Path)
    args = parser.parse_args()
    shutil.rmtree(args.directory, ignore_errors=True)
    print(json.dumps(smoke(args.directory.resolve(), args.strategy, args.lora, args.stubs)))
