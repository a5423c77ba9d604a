"""The samples of the tour, and how they are judged: strategies, metrics, rows with parameters, prompts of one's own."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from end_to_end.test_matrix import only_mlflow_run
from end_to_end.tour import (
    NUM_PROMPTS,
    NUM_SAMPLES,
    ROUNDS,
    SAMPLED,
    STEPS,
    STRATEGIES,
    Tour,
    generation,
    train,
    training,
    write_inputs,
)
from end_to_end.trainer import GENERATION_CONFIG, Run
from readback import (
    read_mlflow,
    read_swanlab,
    read_tensorboard,
    read_trackio,
    read_verl_file,
    read_wandb,
    visible,
)

pytestmark = pytest.mark.xdist_group("tour")


@pytest.fixture(scope="module")
def on_one_rank(server, tmp_path_factory, assets) -> Run:
    """The same with FSDP1, without LoRA and without ranks, and with all numbers."""
    directory = tmp_path_factory.mktemp("judging")
    write_inputs(directory, assets)
    arguments = [*GENERATION_CONFIG, *training(assets, "fsdp"), *generation(), "generation.aggregates=all"]
    return train(server, directory, arguments, ",swanlab", None)


@pytest.fixture(params=["tour", pytest.param("on_one_rank", marks=pytest.mark.slow)])
def finished(request) -> Run:
    made: Tour | Run = request.getfixturevalue(request.param)
    return made.on if isinstance(made, Tour) else made


def test_it_ends_well_with_one_warning_per_cause(finished):
    assert finished.returncode == 0, finished.output[-5000:]
    causes = [warning.partition(":")[0] for warning in finished.warnings_but_late]
    assert sorted(causes) == ["metric broken", "metric reward", "row 2"]


def test_every_prompt_is_answered_under_each_strategy_at_every_round(finished):
    shape = f"({NUM_PROMPTS} prompts x {NUM_SAMPLES // NUM_PROMPTS} completions)"
    assert f"{NUM_SAMPLES} samples {shape} at steps 0, 2 and 4, in checkpoints/generations" in finished.output
    assert f"strategies: {', '.join(STRATEGIES)}; metrics: " in finished.output
    for step in ROUNDS:
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
    for sample in finished.samples(STEPS):
        if sample["strategy"] == "stop" and sample["finish_reason"] == "stop":
            assert sample["generation"].endswith("a")
        if sample["strategy"] == "stop":
            assert "a" not in sample["generation"][:-1]
    by_strategy = {name: [s["generation"] for s in finished.samples(0) if s["strategy"] == name] for name in STRATEGIES}
    assert len({tuple(texts) for texts in by_strategy.values()}) >= 7  # a small model may not tell all of them apart


def test_a_row_has_parameters_of_its_own(finished):
    lengths = {s["row"]: s["params"]["max_new_tokens"] for s in finished.samples(STEPS) if s["row"] is not None}
    # Two ranks have every second row. What row 2 has cannot be used.
    assert lengths in ({0: 10, 1: 3, 2: 10}, {0: 10, 2: 10, 4: 3})


def test_scores_are_recorded_where_there_is_something_to_compare_with(finished):
    with_reference = {"exact_match", "token_f1", "rouge_l", "bleu", "chrf", "shorter"}
    for sample in finished.samples(STEPS):
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


def test_trackers_hold_the_numbers_that_most_people_watch(tour):
    samples = tour.on.samples(STEPS)
    expected = {"num_samples", "seconds", "tokens_per_s", "best", "best_step"}
    for name in STRATEGIES:
        scores = {score for s in samples if s["strategy"] == name for score in s["scores"]} - {"mean_logprob"}
        assert {"exact_match", "bleu", "reward_chars"} < scores
        expected |= {f"{name}/{key}" for key in (*scores, "num_new_tokens", "cut_off", "empty")}
        correct = ("exact_match", "math", "shorter", "reward") if name in SAMPLED else ()
        expected |= {f"{name}/{score}_{what}" for score in correct for what in ("pass_at_2", "majority")}
    for s in samples:
        source = "prompts" if s["row"] is None else s["data_source"]
        expected |= {f"by_source/{source}/{score}" for score in s["scores"] if s["strategy"] == "greedy"}
    for history in held_by_trackers(tour.on).values():
        keys = {key.removeprefix("val/gen/") for key in history[STEPS] if key.startswith("val/gen/")}
        assert keys == expected


def test_trackers_hold_the_same_numbers_at_every_round(finished):
    (run,) = json.loads((finished.generations / "runs.json").read_text())
    of_all = {"val/gen/greedy/seq_rep_4", "val/gen/nucleus/shorter_best", "val/gen/likeliest/mean_logprob"}
    expected = {
        "val/gen/num_samples", "val/gen/greedy/bleu", "val/gen/by_source/capitals/chrf", "val/gen/best",
        "val/gen/nucleus/exact_match_pass_at_2", "val/gen/nucleus/math_majority", "val/gen/by_source/prompts/shorter",
        "val/gen/likeliest/num_new_tokens", *(of_all if run["generation"]["aggregates"] == "all" else ()),
    }  # fmt: skip
    greedy = [s for s in finished.samples(STEPS) if s["strategy"] == "greedy"]
    bleu = [s["scores"]["bleu"] for s in greedy if "bleu" in s["scores"]]
    lengths = [s["num_new_tokens"] for s in greedy]
    values = {
        "val/gen/greedy/bleu": sum(bleu) / len(bleu),
        "val/gen/greedy/num_new_tokens": sum(lengths) / len(lengths),
    }
    for history in held_by_trackers(finished).values():
        for step in ROUNDS:
            assert expected <= history[step].keys()
            assert not any(key in history[step] for key in ("val/gen/exact_match", "val/gen/num_new_tokens"))
        assert {key: history[STEPS][key] for key in values} == pytest.approx(values)


def test_trackers_hold_every_sample_of_every_round(finished):
    for name, history in held_by_trackers(finished).items():
        for step in ROUNDS if name != "file" else ():
            samples, table = finished.samples(step), history[step]["val/samples"]
            assert {"exact_match", "shorter", "mean_logprob", "reward_chars"} <= set(table["columns"]), name
            for key in ("strategy", "prompt", "generation", "finish_reason"):
                column = table["columns"].index(key)
                texts = [visible(sample[key]) if name == "tensorboard" else sample[key] for sample in samples]
                assert [row[column] for row in table["data"]] == texts, (name, step, key)


def test_lines_of_a_round_stand_between_those_of_verl(tour: Tour):
    """In verl's own file, where verl's next line does not overwrite them, nor they the line before."""
    with_rounds, without = [
        [json.loads(line) for line in (run.directory / "project" / "experiment.jsonl").read_text().splitlines()]
        for run in (tour.on, tour.off)
    ]
    steps = [record["step"] for record in with_rounds]
    assert steps == sorted(steps)
    of_rounds = [record for record in with_rounds if "val/gen/seconds" in record["data"]]
    assert [record["step"] for record in of_rounds] == list(ROUNDS)
    of_verl = [(record["step"], set(record["data"])) for record in with_rounds if record not in of_rounds]
    assert of_verl == [(record["step"], set(record["data"])) for record in without]


def test_the_page_of_the_whole_run_goes_to_wandb_and_mlflow(tour):
    """Of which verl would end WandB's before the page is made."""
    finished = tour.on
    (wandb_run,) = finished.directory.glob("wandb/offline-run-*/")
    history = read_wandb(wandb_run)
    pages = {
        "wandb": history[max(history)]["val/samples_page"],
        "mlflow": read_mlflow(*only_mlflow_run(finished))["page"],
    }
    for name, page in pages.items():
        (content,) = re.findall('<script id="valgen-data" type="text/plain">(.*?)</script>', page, re.DOTALL)
        steps = json.loads(gzip.decompress(base64.b64decode(content)))["steps"]
        assert [step["step"] for step in steps] == list(ROUNDS), name
        assert [len(step["answers"]) for step in steps] == [NUM_SAMPLES] * len(ROUNDS), name


def held_by_trackers(result: Run, steps: Sequence[int] = ROUNDS) -> dict[str, dict[int, dict[str, Any]]]:
    """{tracker: {step: {key: value}}} of those that the run had.

    Args:
        steps: Of the rounds, whose tables are under `val/samples`.
    """
    held = {}
    for run_directory in result.directory.glob("swanlog/*run-*/"):
        held["swanlab"] = read_swanlab(run_directory)
    for run_directory in result.directory.glob("wandb/offline-run-*/"):
        held["wandb"] = read_wandb(run_directory)
    if (result.directory / "mlflow.db").exists():
        logged = read_mlflow(*only_mlflow_run(result))
        assert sorted(logged["tables"]) == list(steps)
        history = held["mlflow"] = {step: {"val/samples": table} for step, table in logged["tables"].items()}
        for key, by_step in logged["metrics"].items():
            for step, value in by_step.items():
                history.setdefault(step, {})[key] = value
    if (result.directory / "tensorboard_log").exists():
        held["tensorboard"] = read_tensorboard(result.directory / "tensorboard_log" / "project" / "experiment")
        for values in held["tensorboard"].values():
            for key in sorted(key for key in values if key.startswith("val/samples/")):
                values["val/samples"]["data"] += values[key]["data"]
    if (result.directory / "trackio").exists():
        held["trackio"] = read_trackio(result.directory / "trackio" / "project.db")
    if (result.directory / "project").exists():
        held["file"] = read_verl_file(result.directory / "project" / "experiment.jsonl")
    assert held
    return held


def test_the_best_round_is_kept_and_told(finished):
    means = {}
    for step in ROUNDS:
        lengths = [s["num_new_tokens"] for s in finished.samples(step) if s["strategy"] == "nucleus"]
        means[step] = sum(lengths) / len(lengths)
    best_step = min(means, key=lambda step: means[step])
    best = json.loads((finished.generations / "best.json").read_text())
    del best["before"]
    (run,) = json.loads((finished.generations / "runs.json").read_text())
    assert best == {
        "metric": "nucleus/num_new_tokens", "mode": "min", "value": means[best_step], "step": best_step,
        "prompts": run["prompts"],
    }  # fmt: skip
    lines = [line for line in finished.stdout.splitlines() if line.startswith("nucleus/num_new_tokens: ")]
    assert len(lines) == len(ROUNDS)
    assert lines[-1] == f"nucleus/num_new_tokens: best {means[best_step]:.3g} at step {best_step}"


def test_a_round_ends_with_tables_of_its_numbers(finished):
    summaries = finished.stdout.split("\nStep ")[1:]
    assert len(summaries) == len(ROUNDS)
    for step, summary in zip(ROUNDS, summaries, strict=True):
        first, *lines = summary.split("\n")
        assert first.startswith(f"{step}: {NUM_SAMPLES} samples in ")
        assert first.endswith(" tokens/s")
        table = [line for line in lines if line.startswith("| ")]
        assert max(map(len, table)) <= 120
        assert [line.split()[1] for line in table[: len(STRATEGIES) + 1]] == ["strategy", *STRATEGIES]
        headers = [line.split()[3::2] for line in table if line.startswith("| strategy ")]
        assert {"exact_match", "num_new_tokens", "cut_off", "empty"} <= {name for names in headers for name in names}
