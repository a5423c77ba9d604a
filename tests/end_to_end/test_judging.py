"""What the answers are judged by, on verl's real trainer: strategies, metrics, rows with parameters, own prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from end_to_end.test_matrix import only_mlflow_run
from end_to_end.trainer import GENERATION_CONFIG, HAS_ENGINES, Assets, Run, strategy
from readback import read_mlflow, read_swanlab, read_wandb

METRICS = """
def shorter(sample):
    return float(sample.num_new_tokens < 9)

def reward(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source in ("capitals", "additions")
    return {"score": float(solution_str == ground_truth), "chars": len(solution_str)}

def broken(sample):
    raise RuntimeError("planted")
"""
STRATEGIES = {
    "greedy": {"do_sample": False},
    "nucleus": {"top_p": 0.95, "top_k": 0},
    "min_p": {"min_p": 0.1, "top_p": 1.0},
    "typical": {"typical_p": 0.9},
    "beam": {"do_sample": False, "num_beams": 2},
    "likeliest": {"best_of": 3},
    "stop": {"do_sample": False, "stop_strings": ["a"]},
    "penalty": {"do_sample": False, "repetition_penalty": 1.5},
    "words": {"do_sample": False, "bad_words_ids": [[5], [6]]},
}
SAMPLED = ("nucleus", "min_p", "typical", "likeliest")
NUM_PROMPTS = 5
"""Three rows, and two own prompts."""


def rows_with_parameters(assets: Assets, directory: Path) -> Path:
    kind = "multiturn" if HAS_ENGINES else "singleturn"
    frame = pd.read_parquet(assets.directory / kind / "val.parquet")
    frame["generation_params"] = [
        None,
        '{"max_new_tokens": 3}',
        '{"max_new_tokens": "many"}',
        *[None] * (len(frame) - 3),
    ]
    frame.to_parquet(directory / "val.parquet")
    return directory / "val.parquet"


@pytest.fixture(scope="module", params=["fsdp2", "fsdp"])
def finished(request, server, tmp_path_factory, assets) -> Run:
    directory = tmp_path_factory.mktemp("judging")
    (directory / "own.py").write_text(METRICS)
    (directory / "own.jsonl").write_text('"Name the capital of France."\n{"prompt": "1+1?", "reference": "2"}\n')
    trackers = {"fsdp2": "wandb,mlflow", "fsdp": "swanlab"}[request.param]
    specs = [
        "exact_match",
        "token_f1",
        "rouge_l",
        "bleu",
        "chrf",
        "math",
        "own.py:shorter",
        "own.py:reward",
        "own.py:broken",
    ]
    return server.run(
        directory,
        [
            *GENERATION_CONFIG,
            *assets.overrides(),
            strategy(request.param),
            f"data.val_files={rows_with_parameters(assets, directory)}",
            f"generation.strategies={json.dumps(STRATEGIES).replace(chr(34), '')}",
            f"generation.metrics=[{','.join(specs)}]",
            *("generation.n=2", "generation.max_new_tokens=10", "generation.before_train=true"),
            *("generation.prompts=own.jsonl", "generation.prompts_mode=append", "trainer.max_val_samples=3"),
            *("generation.best_metric=nucleus/num_new_tokens", "generation.best_mode=min"),
            f"trainer.logger=[console,{trackers}]",
        ],
        environment={
            "WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
        },
        num_ranks=2 if request.param == "fsdp2" else None,
    )  # fmt: skip


def test_it_ends_well_with_one_warning_per_cause(finished):
    assert finished.returncode == 0, finished.output[-5000:]
    warnings = [line for line in finished.output.splitlines() if "[WARNING] - " in line and "verl_valgen" in line]
    causes = [line.partition("[WARNING] - ")[2].partition(":")[0] for line in warnings]
    assert sorted(causes) == ["metric broken", "metric reward", "row 2"]


def test_every_prompt_is_answered_under_each_strategy_at_every_round(finished):
    num_samples = NUM_PROMPTS * sum(2 if name in SAMPLED else 1 for name in STRATEGIES)
    assert f"{num_samples} samples at steps 0, 2 and 3, in checkpoints/generations" in finished.output
    for step in (0, 2, 3):
        samples = finished.samples(step)
        assert [(s["index"], s["strategy"], s["completion"]) for s in samples] == [
            (index, name, completion)
            for index in range(NUM_PROMPTS)
            for name in STRATEGIES
            for completion in range(2 if name in SAMPLED else 1)
        ]
        assert [s["row"] is None for s in samples[::13]] == [False] * 3 + [True] * 2
        for sample in samples:
            expected = STRATEGIES[sample["strategy"]]
            assert {name: sample["params"].get(name) for name in expected} == expected
            assert ("mean_logprob" in sample["scores"]) == (sample["strategy"] == "likeliest")


def test_strategies_do_what_they_say(finished):
    for sample in finished.samples(3):
        if sample["strategy"] == "stop" and sample["finish_reason"] == "stop":
            assert sample["generation"].endswith("a")
        if sample["strategy"] == "stop":
            assert "a" not in sample["generation"][:-1]
    by_strategy = {name: [s["generation"] for s in finished.samples(0) if s["strategy"] == name] for name in STRATEGIES}
    assert len({tuple(texts) for texts in by_strategy.values()}) >= 7  # a small model may not tell all of them apart


def test_a_row_has_parameters_of_its_own(finished):
    of_rows = {s["row"]: s["params"]["max_new_tokens"] for s in finished.samples(3) if s["row"] is not None}
    assert of_rows[0] == 10
    assert set(of_rows.values()) <= {3, 10}
    if 1 in of_rows:  # two ranks have every second row
        assert (of_rows[1], of_rows[2]) == (3, 10)


def test_scores_are_recorded_where_there_is_something_to_compare_with(finished):
    with_reference = {"exact_match", "token_f1", "rouge_l", "bleu", "chrf", "shorter"}
    for sample in finished.samples(3):
        names = set(sample["scores"]) - {"mean_logprob"}
        assert ("math" in names) == str(sample["reference"]).isdigit()  # else the name of a capital
        names.discard("math")
        if sample["reference"] is None:
            assert names == {"shorter"}
        elif sample["row"] is None:  # it has no `data_source`, which the reward function wants
            assert names == with_reference
        else:
            assert names == with_reference | {"reward", "reward_chars"}
        assert sample["scores"]["shorter"] == float(sample["num_new_tokens"] < 9)


def test_trackers_hold_scalars_and_scores(finished):
    expected = {
        "val/gen/num_samples", "val/gen/seconds", "val/gen/tokens_per_s", "val/gen/num_new_tokens", "val/gen/cut_off",
        "val/gen/empty", "val/gen/distinct_2", "val/gen/repeated_ngram", "val/gen/exact_match", "val/gen/greedy/bleu",
        "val/gen/nucleus/shorter_best", "val/gen/nucleus/exact_match_pass_at_2", "val/gen/nucleus/math_majority",
        "val/gen/by_source/capitals/chrf", "val/gen/best", "val/gen/best_step", "val/gen/likeliest/mean_logprob",
    }  # fmt: skip
    samples = finished.samples(3)
    greedy = [s["scores"]["bleu"] for s in samples if s["strategy"] == "greedy" and "bleu" in s["scores"]]
    lengths = [s["num_new_tokens"] for s in samples]
    values = {"val/gen/greedy/bleu": sum(greedy) / len(greedy), "val/gen/num_new_tokens": sum(lengths) / len(lengths)}
    if (finished.directory / "swanlog").exists():
        (run_directory,) = (path for path in (finished.directory / "swanlog").glob("*run-*") if path.is_dir())
        histories = [read_swanlab(run_directory)]
    else:
        (run_directory,) = (finished.directory / "wandb").glob("offline-run-*")
        histories = [read_wandb(run_directory)]
        logged = read_mlflow(*only_mlflow_run(finished))
        histories.append(
            {step: {key: of_step.get(step) for key, of_step in logged["metrics"].items()} for step in (0, 2, 3)}
        )
        assert {"exact_match", "shorter", "mean_logprob", "reward_chars"} <= set(logged["latest"]["columns"])
    for history in histories:
        for step in (0, 2, 3):
            assert expected <= history[step].keys()
        assert {key: history[3][key] for key in values} == pytest.approx(values)


def test_the_best_round_is_kept_and_told(finished):
    means = {}
    for step in (0, 2, 3):
        lengths = [s["num_new_tokens"] for s in finished.samples(step) if s["strategy"] == "nucleus"]
        means[step] = sum(lengths) / len(lengths)
    best_step = min(means, key=lambda step: means[step])
    best = json.loads((finished.generations / "best.json").read_text())
    del best["before"]
    assert best == {
        "metric": "nucleus/num_new_tokens", "mode": "min", "value": means[best_step], "step": best_step,
    }  # fmt: skip
    (line,) = [line for line in finished.stdout.splitlines() if line.startswith("Step 3: ")]
    assert f"best {means[best_step]:.3g} at step {best_step};" in line


def test_a_round_ends_with_one_line(finished):
    lines = [line for line in finished.stdout.splitlines() if line.startswith("Step ")]
    assert [line.partition(":")[0] for line in lines] == ["Step 0", "Step 2", "Step 3"]
    for line in lines:
        assert " samples in " in line
        assert " tokens/s; best " in line
        assert "; num_new_tokens " in line


def test_first_turns_of_some_validations_and_on_after_a_stop(server, tmp_path, assets):
    """`turn`, `every` and the best value over a resumed run; own prompts in place of the data's."""
    (tmp_path / "own.txt").write_text("1+1?\n2+2?\n")
    overrides = [
        *GENERATION_CONFIG, *assets.overrides(multiturn=True), "trainer.test_freq=1", "trainer.save_freq=2",
        "generation.do_sample=false", "generation.max_new_tokens=4", "generation.every=2", "generation.turn=all",
        "generation.best_metric=num_new_tokens", "trainer.max_val_samples=8", "trainer.total_epochs=2",
    ]  # fmt: skip
    first = server.run(tmp_path, [*overrides, "trainer.total_training_steps=4"])
    assert first.returncode == 0, first.output[-5000:]
    assert "samples at steps 2 and 4, in" in first.output
    assert sorted(path.name for path in first.generations.glob("step_*")) == [f"step_{s:08d}.jsonl" for s in (2, 4)]
    rows = [sample["row"] for sample in first.samples(4)]
    assert len(rows) > len(set(rows)) == 8  # every third conversation has two turns
    best = json.loads((first.generations / "best.json").read_text())

    own = ["generation.prompts=own.txt", "trainer.total_training_steps=6", "trainer.resume_mode=auto"]
    second = server.run(tmp_path, [*overrides, *own])
    assert second.returncode == 0, second.output[-5000:]
    assert [(s["row"], s["prompt_text"], s["reference"]) for s in second.samples(6)] == [
        (None, "1+1?", None),
        (None, "2+2?", None),
    ]
    after = json.loads((second.generations / "best.json").read_text())
    assert after["value"] >= best["value"]
    assert after["step"] in (best["step"], 6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generation.prompts=/nowhere/own.jsonl", "generation.prompts: /nowhere/own.jsonl: there is no such file"),
        ("generation.metrics=[/nowhere/own.py:f]", "generation.metrics: /nowhere/own.py:f: there is no such file"),
        ("generation.strategies={x: {penalty_alpha: 0.6}}", "generation.strategies.x.penalty_alpha is not supported"),
        ("generation.best_metric=exact", "generation.best_metric must be one of num_new_tokens, "),
    ],
)  # fmt: skip
def test_wrong_names_end_the_run_at_start(server, tmp_path, assets, override, message):
    result = server.run(tmp_path, [*GENERATION_CONFIG, *assets.overrides(), override])
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
