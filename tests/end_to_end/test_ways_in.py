"""The ways in besides verl's plain command, and what must not happen in other programs."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import assert_greedy_samples, plain_greedy, plain_model
from end_to_end.trainer import (
    CONFIG_NAME,
    GENERATION_CONFIG,
    VERL_MODULE,
    VERL_VERSION,
    run,
    strategy,
    write_program,
)
from transformers import AutoTokenizer

from verl_valgen.prompts.tokens import Decoder

ROOT = Path(__file__).resolve().parents[2]
GREEDY = {"VERL_GENERATION_DO_SAMPLE": "false", "VERL_GENERATION_MAX_NEW_TOKENS": "8"}


@pytest.mark.slow
def test_a_users_own_yaml_anywhere_on_disk(server, tmp_path, assets):
    folder = tmp_path / "somewhere else"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        f"defaults: [{CONFIG_NAME}, _self_]\n"
        "generation: {do_sample: false, max_new_tokens: 7}\n"
        "trainer: {max_val_samples: 3}\n"
    )
    arguments = ["--config-dir", str(folder), "--config-name", "mine", *assets.overrides()]
    # Environment beats YAML, the command line beats both.
    arguments += ["generation.max_new_tokens=4"]
    environment = {"VERL_MAX_VAL_SAMPLES": "2", "VERL_GENERATION_MAX_NEW_TOKENS": "9"}
    result = server.run(tmp_path / "run", arguments, environment=environment)
    assert result.returncode == 0, result.output[-5000:]
    samples = result.samples(3)
    assert len(samples) == 2
    assert samples[0]["params"] == {"do_sample": False, "max_new_tokens": 4, "dtype": "float32"}


@pytest.mark.slow
def test_config_path_of_a_users_own_folder(server, tmp_path, assets):
    (tmp_path / "mine.yaml").write_text(f"defaults: [{CONFIG_NAME}, _self_]\ngeneration: {{do_sample: false}}\n")
    arguments = ["--config-path", str(tmp_path), "--config-name", "mine", "--cfg", "job"]
    result = server.run(tmp_path / "run", [*arguments, *assets.overrides()])
    assert result.returncode == 0, result.output[-5000:]
    assert "do_sample: false" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(VERL_VERSION.release < (0, 6), reason="verl 0.5 loads no adapters")
def test_a_dora_adapter_is_merged(server, tmp_path, assets):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "use_dora": True}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(assets.model), LoraConfig(**lora, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "adapter")
    # verl 0.6.1 has no such key of its own; 0.9.1 loads no adapters where the rank is 0.
    adapter = [f"++model.lora_adapter_path={tmp_path}/adapter", "model.lora_rank=4"]
    result = server.run(
        tmp_path / "run",
        [*assets.overrides(multiturn=True), strategy("fsdp2"), *adapter],
        environment=GREEDY,
        num_ranks=2,
    )
    assert result.returncode == 0, result.output[-5000:]
    plain = plain_model(result.checkpoints / "global_step_3", assets.model, lora | {"task_type": "CAUSAL_LM"})
    samples = result.samples(3)
    assert len(samples) == 5
    assert_greedy_samples(samples, plain, AutoTokenizer.from_pretrained(assets.model), 8)


SUBCLASS = """
def fit(self):
    import json
    import torch
    batches = list(self.val_dataloader)
    before = [self.generate_samples(batch) for batch in batches]
    rank = torch.distributed.get_rank()
    super().fit()
    after = self.generate_samples(batches[0])
    json.dump({"before": before, "after": after}, open(f"answers_{rank}.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["fsdp", "fsdp2"])
def test_a_subclass_generates_before_after_and_during_fit(server, tmp_path, assets, fsdp):
    """Without engines on single-turn data: the batches' loss mask is shifted; with them the batches are nested."""
    result = server.run(
        tmp_path / "run",
        [*assets.overrides(), strategy(fsdp)],
        environment=GREEDY,
        num_ranks=2,
        program=write_program(tmp_path / "program.py", SUBCLASS),
    )
    assert result.returncode == 0, result.output[-5000:]
    answers = [json.loads((result.directory / f"answers_{rank}.json").read_text()) for rank in range(2)]
    assert answers[1] == {"before": [[[], []]] * 2, "after": [[], []]}
    prompts, generations = answers[0]["after"]
    assert len(prompts) == 4  # rank 0's own batch
    samples = result.samples(3)
    assert prompts == [sample["prompt"] for sample in samples[:4]]
    assert generations == [sample["generation"] for sample in samples[:4]]

    # Before any training the model is the one on disk.
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32).eval()
    for prompt, generation in zip(*answers[0]["before"][0], strict=True):
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert generation == Decoder(tokenizer).answer(plain_greedy(fresh, prompt_ids, 8))
    assert answers[0]["before"][0][1] != generations


@pytest.mark.slow
@pytest.mark.parametrize("example", ["environment.sh", "config.sh", "subclass.py", "judging.sh"])
def test_the_examples_run_as_they_stand(tmp_path, example):
    """In a copy, for they write beside themselves."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    environment = {
        **os.environ,
        "TRAINER": VERL_MODULE.rpartition(".")[2],
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }

    def call(*arguments: str) -> None:
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    name = Path(example).stem
    if name == "subclass":  # the others make their assets themselves
        call(sys.executable, "examples/assets.py", "--multiturn", "demo/assets")
    call("bash" if example.endswith(".sh") else sys.executable, f"examples/{example}")
    files = sorted((tmp_path / "demo" / name / "generations").glob("*.jsonl"))
    # One in the middle, one at the early exit; or before training, at every second of five validations, at the last.
    assert len(files) == (4 if name == "judging" else 2)
    assert all(json.loads(line)["generation"] is not None for path in files for line in path.read_text().splitlines())


UNRELATED = """
import sys
import hydra

@hydra.main(config_path=None, version_base=None)
def main(config):
    pass

main()
print(sorted(name for name in sys.modules if name.split(".")[0] in ("torch", "verl", "transformers", "verl_valgen")))
"""


COMPOSE = """
with hydra.initialize(config_path=None, version_base=None):
    hydra.compose()
"""


@pytest.mark.parametrize("way", ["file", "-c"])
def test_an_unrelated_hydra_program_loads_next_to_nothing(tmp_path, way):
    program = tmp_path / f"{VERL_MODULE.rpartition('.')[2]}.py"  # the name alone is not verl's
    program.write_text(UNRELATED)
    arguments = [program] if way == "file" else ["-c", UNRELATED.replace("main()\n", COMPOSE, 1)]
    environment = {**os.environ, "VERL_GENERATION_TEMPERATURE": "1.0"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(done.stdout))
    assert loaded == {"verl_valgen", "verl_valgen.activation", "verl_valgen.hosts", "verl_valgen.patching"}


@pytest.mark.any_verl
def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "verl", "transformers", "wandb", "swanlab", "mlflow", "hydra", "omegaconf")
    code = f"import sys, verl_valgen; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path, assets):
    """Built, installed beside nothing else, and used; the peers come from this environment's site-packages."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    assert not (site / "config").exists()
    # A folder named in a .pth file is searched, but its own .pth files (an editable install) are not read.
    peers = [path for path in sys.path if path.endswith("site-packages")]
    (site / "peers.pth").write_text("\n".join(peers) + "\n")
    where = subprocess.run(
        [python, "-c", "import verl_valgen; print(verl_valgen.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(site) in where.stdout

    arguments = [*GENERATION_CONFIG, "generation=greedy", "generation.max_new_tokens=4"]
    arguments += assets.overrides(multiturn=True)
    result = run(tmp_path / "run", arguments, python=str(python))
    assert result.returncode == 0, result.output[-5000:]
    assert len(result.samples(2)) == 5
