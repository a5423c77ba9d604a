"""What is peculiar to WandB: rows that close, steps that only grow."""

from __future__ import annotations

from pathlib import Path

import pytest
from destinations import make_round, make_run, make_sample
from readback import wandb_records

from verl_valgen.trackers import over_steps
from verl_valgen.trackers.wandb import WandbTracker


@pytest.fixture
def wandb_run(open_destination):
    return open_destination("wandb")


def test_what_the_trainer_logs_afterwards_is_kept(wandb_run):
    for step in (5, 6):
        wandb_run.run.log({"train/loss": 1.0}, step=step)
        wandb_run.tracker.log(make_round([make_sample(step)], step, scores={"exact": 0.5}))
        wandb_run.run.log({"val/loss": 2.0}, step=step)
    rounds = wandb_run.read()
    for step in (5, 6):
        assert rounds[step].rows[0]["generation"] == f"answer 0 at {step}"
        values = rounds[step].values
        assert (values["train/loss"], values["val/gen/exact"], values["val/loss"]) == (1.0, 0.5, 2.0)


def test_late_round_joins_the_open_row_and_leaves_it_open(wandb_run):
    wandb_run.run.log({"train/loss": 1.0}, step=7)
    wandb_run.tracker.log(make_round([make_sample(6)], 6, scores={"exact": 0.5}))
    wandb_run.run.log({"val/loss": 2.0}, step=7)
    found = wandb_run.read()[7]
    assert found.rows[0]["step"] == 6
    values = found.values
    assert (values["train/loss"], values["val/gen/exact"], values["val/loss"]) == (1.0, 0.5, 2.0)
    assert values["val/samples_step"] == 6


def _log_rounds(wandb_run, *steps):
    """Rounds of as many samples as their step's last digit says, so that one that covers another shows it."""
    for step in steps:
        samples = [make_sample(step, i) for i in range(step % 10)]
        wandb_run.tracker.log(make_round(samples, step, scores={"exact": step / 100}))


def _found(wandb_run, *steps):
    """{row: {key: value}} of the run, in which each round of `steps` stands in one row, with all that is its own."""
    rows = wandb_run.read()
    assert sorted(found.values["val/samples_step"] for found in rows.values() if found.rows) == sorted(steps)
    for found in rows.values():
        if found.rows:
            step = found.values["val/samples_step"]
            answers = [f"answer {i} at {step}" for i in range(step % 10)]
            assert [row["generation"] for row in found.rows] == answers
            assert {row["step"] for row in found.rows} == {step}
            texts = {key: value for key, value in found.values.items() if key.endswith("_generation")}
            assert sorted(text for text in texts.values() if text is not None) == answers
            assert found.values["val/gen/exact"] == step / 100
    return {row: found.values for row, found in rows.items()}


def test_several_late_rounds_in_one_row_are_all_found_again(wandb_run):
    wandb_run.run.log({"train/loss": 1.0}, step=27)
    _log_rounds(wandb_run, 14, 15, 16)
    wandb_run.run.log({"val/loss": 2.0}, step=27)
    wandb_run.tracker.close()
    values = _found(wandb_run, 14, 15, 16)
    assert (values[27]["train/loss"], values[27]["val/loss"]) == (1.0, 2.0)


def test_a_round_that_is_in_time_has_its_row_and_the_late_one_in_it_another(wandb_run):
    wandb_run.run.log({"train/loss": 1.0}, step=27)
    _log_rounds(wandb_run, 19, 27)  # the first has more samples
    wandb_run.run.log({"val/loss": 2.0}, step=27)
    wandb_run.run.log({"train/loss": 3.0}, step=28)
    _log_rounds(wandb_run, 25)
    wandb_run.run.log({"train/loss": 4.0}, step=29)
    wandb_run.tracker.close()
    values = _found(wandb_run, 19, 25, 27)
    assert [values[step].get("train/loss") for step in (27, 28, 29)] == [1.0, 3.0, 4.0]
    assert (values[27]["val/samples_step"], values[27]["val/loss"]) == (27, 2.0)


def test_verls_rows_between_late_rounds_are_as_without_them(wandb_run):
    for step in range(31, 37):
        wandb_run.run.log({"train/loss": float(step)}, step=step)
        _log_rounds(wandb_run, step - 12)
        wandb_run.run.log({"val/loss": float(step)}, step=step)
    wandb_run.tracker.close()
    values = _found(wandb_run, *(step for step in range(19, 25) if step % 10))
    for step in range(31, 37):
        assert (values[step]["train/loss"], values[step]["val/loss"]) == (step, step)


def test_rounds_are_found_again_where_a_callback_logs_without_a_step(wandb_run):
    """Each of its calls closes a row: WandB's counter is ahead of the trainer's, and verl's own rows are refused until
    the trainer has caught up, so that rounds find the same row open.
    """
    for call in range(20):
        wandb_run.run.log({"mine": call})
    for step in (11, 12, 13, 20, 21, 22):
        wandb_run.run.log({"train/loss": float(step)}, step=step)
        if step < 20:
            _log_rounds(wandb_run, step)
        wandb_run.run.log({"val/loss": float(step)}, step=step)
    wandb_run.tracker.close()
    values = _found(wandb_run, 11, 12, 13)
    assert [values[call]["mine"] for call in range(20)] == list(range(20))
    assert [(values[step]["train/loss"], values[step]["val/loss"]) for step in (21, 22)] == [(21, 21), (22, 22)]


def test_a_round_whose_row_verl_closes_meanwhile_is_found_again(wandb_run, monkeypatch):
    """A slow call goes on behind the trainer."""
    wandb_run.run.log({"train/loss": 1.0}, step=11)
    log = WandbTracker._log

    def log_overtaken(tracker, entry, **where):
        if "step" in where:
            wandb_run.run.log({"train/loss": 2.0}, step=12)
        log(tracker, entry, **where)

    monkeypatch.setattr(WandbTracker, "_log", log_overtaken)
    _log_rounds(wandb_run, 11)
    values = _found(wandb_run, 11)
    assert [values[step]["train/loss"] for step in (11, 12)] == [1.0, 2.0]


def test_a_round_that_is_repeated_replaces_itself_while_its_row_is_open(wandb_run):
    wandb_run.run.log({"train/loss": 1.0}, step=22)
    _log_rounds(wandb_run, 22)
    samples = [make_sample(22, generation="again")]
    wandb_run.tracker.log(make_round(samples, 22))
    wandb_run.run.log({"train/loss": 1.0}, step=23)
    wandb_run.tracker.log(make_round(samples, 22))
    rows = wandb_run.read()
    assert [[row["generation"] for row in rows[step].rows] for step in (22, 23)] == [["again"], ["again"]]
    assert [rows[step].values["val/samples_step"] for step in (22, 23)] == [22, 22]
    # The first time there was a second sample, and a score.
    assert [rows[22].values.get(key) for key in ("val/sample_2_generation", "val/gen/exact")] == [None, None]


def test_numbers_are_drawn_over_their_own_steps(wandb_run):
    _log_rounds(wandb_run, 1)
    wandb_run.read()
    (path,) = Path(wandb_run.run.settings.sync_dir).glob("*.wandb")
    metrics = [record.metric for record in wandb_records(path.read_bytes()) if record.HasField("metric")]
    assert [metric.step_metric for metric in metrics if metric.glob_name == "val/gen/*"] == ["val/samples_step"]


def _over_steps(wandb_run):
    """(number of increments before, rows as mappings) of each step."""
    tables = {step: found.values.get("val/samples_over_steps") for step, found in wandb_run.read().items()}
    return {
        step: (
            table["num_earlier_increments"],
            [dict(zip(table["columns"], row, strict=True)) for row in table["data"]],
        )
        for step, table in tables.items()
        if table is not None
    }


def test_a_table_over_the_steps_grows_by_each_round(wandb_run):
    for step in (1, 2, 3):
        samples = [
            make_sample(step, index, completion=completion, strategy=strategy, scores={"exact": 0.5})
            for strategy in ("default", "nucleus")
            for index in (0, 1)
            for completion in (0, 1)
        ]
        wandb_run.tracker.log(make_round(samples, step))
    found = _over_steps(wandb_run)
    assert [found[step][0] for step in (1, 2, 3)] == [0, 1, 2]
    for step in (1, 2, 3):
        assert found[step][1] == [
            {
                "step": step, "index": index, "prompt_text": f"question {index}",
                "generation": f"answer {index} at {step}", "reference": f"reference {index}", "exact": 0.5,
            }
            for index in (0, 1)
        ]  # fmt: skip


def test_texts_in_the_table_over_steps_are_short(wandb_run):
    sample = make_sample(1, prompt_text="p" * 2000, generation="g" * 2000, reference="r" * 2000)
    wandb_run.tracker.log(make_round([sample], 1))
    _, (row,) = _over_steps(wandb_run)[1]
    assert (row["prompt_text"], row["generation"]) == ("p" * 197 + "...", "g" * 497 + "...")
    assert row["reference"] == "r" * 497 + "..."


def test_the_table_over_steps_takes_a_score_that_comes_later(wandb_run):
    for step, scores in ((1, {}), (2, {"exact": 1.0}), (3, {"bleu": 0.5}), (4, {"exact": None})):
        wandb_run.tracker.log(make_round([make_sample(step, scores=scores)], step))
    earlier, rows = _over_steps(wandb_run)[3]
    assert earlier == 0  # it was begun anew, with what it had
    assert [(row["step"], row["exact"], row["bleu"]) for row in rows] == [
        (1, None, None),
        (2, 1.0, None),
        (3, None, 0.5),
    ]


def test_the_table_over_steps_is_bounded_however_long_the_run(wandb_run, monkeypatch):
    monkeypatch.setattr(over_steps, "_MAX_INCREMENTS", 4)
    monkeypatch.setattr(over_steps, "_MAX_PROMPTS", 3)
    for step in range(1, 15):
        wandb_run.tracker.log(make_round([make_sample(step, i) for i in range(5)], step))
    found = _over_steps(wandb_run)
    assert max(earlier for earlier, _ in found.values()) < 4
    for _, rows in found.values():
        steps = sorted({row["step"] for row in rows})
        assert len(rows) == 3 * len(steps)
        assert len(steps) in (1, 4)
        assert len(steps) == 1 or steps[0] == 1
    assert found[13][1][-1]["step"] == 13  # the third time


def test_a_wandb_without_incremental_tables_is_served_all_the_same(wandb_run):
    def table_of_old(columns, data=None):
        return new_table(columns=columns, data=data)

    new_table = wandb_run.tracker._new_table
    wandb_run.tracker._over_steps = over_steps.TableOverSteps(table_of_old, 100, "default")
    _log_rounds(wandb_run, 1, 2)
    assert "val/samples_over_steps" not in _found(wandb_run, 1, 2)[2]


def test_the_page_is_logged_as_it_is(wandb_run):
    page = "<!doctype html><html><head><meta charset='utf-8'></head><body>naïve 日本語</body></html>"
    _log_rounds(wandb_run, 1)
    wandb_run.tracker.add_page(page)
    wandb_run.tracker.close()
    assert _found(wandb_run, 1)[1]["val/samples_page"] == page


def test_close_leaves_the_run_open(wandb_run):
    wandb_run.tracker.close()
    assert WandbTracker.is_live(make_run())
    wandb_run.run.finish()
    assert not WandbTracker.is_live(make_run())
    with pytest.raises(RuntimeError, match="no live run"):
        WandbTracker(make_run(max_chars=100))
