"""Crashes of verl's that are foretold from the configuration: only those that are certain."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, DistributedSampler

from verl_valgen import activation
from verl_valgen.hosts import forecast
from verl_valgen.hosts.fsdp_sft import FSDPSFTHost
from verl_valgen.hosts.sft import SFTHost
from verl_valgen.hosts.sft_ray import RaySFTHost


@pytest.fixture
def config(tmp_path):
    """verl's configuration for five steps of 8 rows, validated after every second."""
    for name, num_rows in {"train": 40, "empty": 0, "three": 3, "four": 4, "seven": 7}.items():
        pd.DataFrame({"x": range(num_rows)}).to_parquet(tmp_path / f"{name}.parquet")
    return OmegaConf.create(
        {
            "data": {
                "train_files": str(tmp_path / "train.parquet"),
                "val_files": None,
                "train_max_samples": -1,
                "val_max_samples": -1,
                "train_batch_size": 8,
                "micro_batch_size_per_gpu": 4,
                "custom_cls": {"path": None},
            },
            "engine": {"strategy": "fsdp", "ulysses_sequence_parallel_size": 1},
            "ulysses_sequence_parallel_size": 1,
            "trainer": {
                "total_epochs": 1,
                "total_training_steps": None,
                "test_freq": 2,
                "default_local_dir": str(tmp_path / "checkpoints"),
                "resume_mode": "auto",
                "resume_from_path": None,
            },
        }
    )


def foretold(host_class, config, tmp_path, *overrides, num_ranks=1):
    dotlist = [override.replace("<tmp>", str(tmp_path)) for override in overrides]
    return host_class.why_validation_will_crash(OmegaConf.merge(config, OmegaConf.from_dotlist(dotlist)), num_ranks)


@pytest.mark.parametrize(
    ("overrides", "num_rows"),
    [
        (["data.val_files=<tmp>/seven.parquet"], 7),
        (["data.val_files=[<tmp>/seven.parquet,<tmp>/three.parquet]"], 10),
        (["data.val_files=<tmp>/seven.parquet", "data.val_max_samples=4"], 4),
        # Any of the seven may be among the four.
        (["data.val_files=<tmp>/seven.parquet", "data.val_max_samples=4", "data.shuffle=true"], 7),
        (["data.val_files=<tmp>/seven.parquet", "data.custom_cls.path=own.py"], None),
        (["data.val_files=<tmp>/nosuch.parquet"], None),
    ],
)
def test_the_validation_rows_to_choose_from(config, tmp_path, overrides, num_rows):
    dotlist = [override.replace("<tmp>", str(tmp_path)) for override in overrides]
    assert SFTHost.num_validation_rows(OmegaConf.merge(config, OmegaConf.from_dotlist(dotlist))) == num_rows
    assert SFTHost.num_validation_rows(OmegaConf.create({})) is None


EMPTY = "data.val_files=<tmp>/empty.parquet"


@pytest.mark.parametrize(
    ("overrides", "step"),
    [
        ([], 2),
        (["data.val_files=''"], 2),
        (["data.val_files=[]"], 2),
        ([EMPTY], 2),
        (["data.val_files=[<tmp>/empty.parquet,<tmp>/empty.parquet]"], 2),
        (["trainer.test_freq=5"], 5),
        (["trainer.test_freq=after_each_epoch"], 5),
        (["trainer.test_freq=6", "trainer.total_epochs=2"], 6),
        (["trainer.total_training_steps=2"], 2),
        (["trainer.resume_mode=disable", "trainer.resume_from_path=/a/global_step_4"], 2),
    ],
)
def test_engines_crash_without_validation_rows(config, tmp_path, overrides, step):
    reason = foretold(SFTHost, config, tmp_path, *overrides)
    assert reason.startswith("data.val_files must ")
    assert reason.endswith(f"makes verl validate at step {step}, where it would crash")


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.val_files=<tmp>/three.parquet"],  # a loss of nan, no crash
        ["data.val_files=/not/there.parquet"],  # verl says so itself
        ["data.val_files=hdfs://far/away.parquet"],
        [EMPTY, "data.custom_cls.path=mine.py"],
        ["trainer.test_freq=-1"],
        [EMPTY, "trainer.test_freq=-1"],
        ["trainer.test_freq=6"],  # beyond the data's steps
        ["trainer.test_freq=3", "trainer.total_training_steps=2"],
        ["data.train_files=hdfs://far/away.parquet"],  # who knows how many steps there are
        ["data.train_max_samples=15"],  # one step
        ["data.train_batch_size=41"],
        ["trainer.resume_from_path=/a/global_step_4"],
        ["engine.strategy=megatron"],
        ["trainer.test_freq=often"],  # verl says so itself
        ["data.train_batch_size=null"],
    ],
)
def test_engines_may_do_without(config, tmp_path, overrides):
    assert foretold(SFTHost, config, tmp_path, *overrides) is None


def test_rays_driver_has_one_loader_whatever_shares_a_sequence(config, tmp_path):
    overrides = ["data.val_files=null", "engine.ulysses_sequence_parallel_size=2", "data.train_batch_size=16"]
    reason = foretold(RaySFTHost, config, tmp_path, *overrides)
    assert (
        reason == "data.val_files must be set: trainer.test_freq=2 makes verl validate at step 2, where it would crash"
    )


def test_a_run_that_may_resume_may_be_over(config, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("5")
    assert foretold(SFTHost, config, tmp_path) is None
    assert foretold(SFTHost, config, tmp_path, "trainer.resume_mode=disable") is not None


@pytest.mark.parametrize(
    ("file", "overrides", "num_ranks", "message"),
    [
        ("empty", [], 1, "must have at least 4 rows, a batch on each of 1 data-parallel ranks"),
        ("three", [], 1, "(data.micro_batch_size_per_gpu=4), got 3: verl drops incomplete batches"),
        ("three", ["trainer.test_freq=-1"], 1, "would crash at its first validation, at step 5"),
        ("four", ["data.val_max_samples=3"], 1, "got 3: "),
        ("seven", [], 2, "must have at least 8 rows, a batch on each of 2 data-parallel ranks"),
        ("four", [], 1, None),
        ("seven", ["ulysses_sequence_parallel_size=2"], 2, None),
        ("three", ["data.micro_batch_size_per_gpu=3"], 1, None),
        ("three", ["data.custom_cls.path=mine.py"], 1, None),
        ("three", ["trainer.test_freq=-1", "trainer.total_training_steps=6"], 1, None),  # validates nowhere
        ("three", ["data.train_max_samples=7"], 1, None),  # no step at all
    ],
)
def test_the_older_trainer_needs_one_whole_batch(config, tmp_path, file, overrides, num_ranks, message):
    data = f"data.val_files=<tmp>/{file}.parquet"
    reason = foretold(FSDPSFTHost, config, tmp_path, data, *overrides, num_ranks=num_ranks)
    assert reason is None if message is None else message in reason


@given(rows=st.integers(0, 60), num_ranks=st.integers(1, 5), batch_size=st.integers(1, 9), data=st.data())
def test_batches_are_those_of_verls_loaders(rows, num_ranks, batch_size, data):
    rank = data.draw(st.integers(0, num_ranks - 1))
    dataset = range(rows)
    sampler = DistributedSampler(dataset, num_replicas=num_ranks, rank=rank, shuffle=False, drop_last=True)
    loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=True)
    assert forecast.num_batches(rows, num_ranks, batch_size) == len(loader) == len(list(loader))


@pytest.mark.parametrize("host_class", [SFTHost, FSDPSFTHost])
@pytest.mark.parametrize("generation", [{}, {"enabled": False}, None])
def test_a_certain_crash_ends_the_program_where_generation_is_asked_for(
    config, tmp_path, monkeypatch, capsys, host_class, generation
):
    started = []
    config.data.val_files = str(tmp_path / "empty.parquet")
    if generation is not None:
        config.generation = generation
    monkeypatch.setattr(host_class, "has_accelerator", classmethod(lambda cls, module: True))
    module = SimpleNamespace(**{host_class.trainer_name: type("Trainer", (), {})})

    def run():
        activation._run(config, host_class, module, started.append, trainer_class=None)

    if generation == {}:
        with pytest.raises(SystemExit) as e:
            run()
        assert e.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("verl-valgen: data.val_files must have ")
        assert not started
    else:  # verl's own failure stays verl's
        run()
        assert started == [config]


@pytest.mark.parametrize(
    ("val_files", "num_rows", "test_freq", "message"),
    [
        (None, None, 2, "data.val_files is not set, so verl will fail where it validates (trainer.test_freq=2)"),
        (None, None, -1, "data.val_files is not set"),
        ("a.parquet", 0, 2, "data.val_files has no rows, so verl will fail where it validates (trainer.test_freq=2)"),
        ("a.parquet", 0, -1, "data.val_files has no rows"),
        ("a.parquet", 5, 2, "data.val_files has 5 rows, fewer than one global batch (data.train_batch_size=8, 8 rows on"
         " each of 1 data-parallel ranks), and verl drops incomplete batches: its val/loss will be nan"),
        ("a.parquet", 8, 2, None),
    ],
)  # fmt: skip
def test_why_engines_see_no_batch(val_files, num_rows, test_freq, message):
    host = SFTHost.__new__(SFTHost)
    host.config = OmegaConf.create({"data": {"val_files": val_files}})
    host.engine = SimpleNamespace(get_data_parallel_size=lambda: 1)
    host.trainer = SimpleNamespace(
        val_dataset=None if num_rows is None else range(num_rows),
        val_dataloader=[0] * (num_rows // 8) if num_rows else None,  # verl makes none for an empty data set
        test_freq=test_freq,
        global_batch_size=8,
        train_batch_size_per_dp=8,
    )
    assert host.why_no_validation_batch() == message
