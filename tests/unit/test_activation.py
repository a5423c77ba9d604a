"""From the configuration to the trainer: checked once, handed on, and what ends the program at the start."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_valgen import activation, mixin
from verl_valgen.rounds import preflight as preflight_module
from verl_valgen.settings import load as load_module
from verl_valgen.settings.checks import ConfigError


class VerlsTrainer:
    """Stands for verl's: it keeps the configuration that it is built with."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config


class SmallHost:
    trainer_name = "VerlsTrainer"
    is_spmd = True

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @staticmethod
    def has_accelerator(module: Any) -> bool:
        return True

    @staticmethod
    def why_validation_will_crash(config: DictConfig, num_ranks: int) -> str | None:
        return None

    @staticmethod
    def launch_support(module: Any, config: DictConfig) -> Any:
        return nullcontext()

    @staticmethod
    def while_building(module: Any) -> Any:
        return nullcontext()


class Program:
    """verl's module, and what its `run_sft` built."""

    def __init__(self) -> None:
        self.VerlsTrainer: type = VerlsTrainer
        self.trainer: Any = None

    def run_sft(self, config: DictConfig) -> None:
        self.trainer = self.VerlsTrainer(config=config)

    def run(self, config: DictConfig, trainer_class: type | None = None) -> Any:
        activation._run(config, SmallHost, self, self.run_sft, trainer_class)  # type: ignore[arg-type]
        assert self.VerlsTrainer is VerlsTrainer
        return self.trainer


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """How often the settings are loaded and the file is read; the rounds only keep what they are given."""
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(load_module, "load_settings")
    counted(preflight_module, "load_settings")
    counted(preflight_module, "read_own_prompts")
    monkeypatch.setattr(mixin, "host_class_for", lambda cls: (SmallHost, None))
    rounds = lambda host, settings, file_prompts: SimpleNamespace(settings=settings, file_prompts=file_prompts)  # noqa: E731
    monkeypatch.setattr(mixin, "ValidationRounds", rounds)
    return calls


@pytest.fixture
def config(tmp_path) -> DictConfig:
    (tmp_path / "own.txt").write_text("a\nb\n")
    return OmegaConf.create({"generation": {"prompts": f"{tmp_path}/own.txt", "top_k": 3}})


class Own(mixin.ValidationGenerationMixin, VerlsTrainer):
    pass


@pytest.mark.parametrize("trainer_class", [None, Own])
def test_a_run_loads_its_settings_and_reads_its_file_once(config, calls, trainer_class):
    trainer = Program().run(config, trainer_class)
    assert trainer.config is config
    assert isinstance(trainer, mixin.ValidationGenerationMixin)
    assert (trainer._rounds.settings.top_k, len(trainer._rounds.file_prompts)) == (3, 2)
    assert calls == ["load_settings", "read_own_prompts"]
    assert type(trainer)._preflight is None  # what was checked is of this run alone


def test_a_trainer_that_a_program_constructs_checks_its_own_configuration(config, calls):
    trainer = Own(config)
    assert (trainer._rounds.settings.top_k, len(trainer._rounds.file_prompts)) == (3, 2)
    assert calls == ["load_settings", "read_own_prompts"]
    with pytest.raises(ConfigError, match=r"generation\.top_k must be an integer"):
        Own(OmegaConf.create({"generation": {"top_k": -1}}))


def test_a_trainer_with_another_configuration_than_the_runs_checks_that(config, calls):
    class Altering(Own):
        def __init__(self, config: DictConfig) -> None:
            super().__init__(OmegaConf.merge(config, {"generation": {"top_k": 9}}))

    assert Program().run(config, Altering)._rounds.settings.top_k == 9


def test_with_generation_off_verls_own_class_trains(config, calls):
    config.generation.enabled = False
    assert type(Program().run(config)) is VerlsTrainer
    assert calls == ["load_settings"]
    by_hand = Program().run(config, Own)
    assert (by_hand._rounds.settings.enabled, by_hand._rounds.settings.top_k) == (False, 3)


@pytest.mark.parametrize("trainer_class", [None, Own])
@pytest.mark.parametrize(
    ("block", "lines"),
    [
        ({"top_k": -1}, ["generation.top_k must be an integer >= 0 (0 switches it off), got -1"]),
        (
            {"temprature": 3, "metrics": ["blue"], "prompts": "/nowhere.txt"},
            [
                "unknown key generation.temprature",
                "generation.metrics must be",
                "generation.prompts: /nowhere.txt: ",
            ],
        ),
    ],
)
def test_wrong_configuration_ends_the_program_with_a_line_for_each_mistake(
    calls, capsys, monkeypatch, trainer_class, block, lines
):
    with pytest.raises(SystemExit) as ended:
        Program().run(OmegaConf.create({"generation": block}), trainer_class)
    assert ended.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(lines)
    assert all(map(str.startswith, printed, [f"verl-valgen: {line}" for line in lines]))

    monkeypatch.setenv("LOCAL_RANK", "1")  # said once per node
    with pytest.raises(SystemExit):
        Program().run(OmegaConf.create({"generation": block}), trainer_class)
    assert capsys.readouterr().err == ""


def test_what_only_the_run_can_show_to_be_wrong_ends_the_program_alike(config, calls, capsys, monkeypatch):
    class Failing(Own):
        def __init__(self, config: DictConfig) -> None:
            raise ConfigError("a line\nand another")

    with pytest.raises(SystemExit) as ended:
        Program().run(config, Failing)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "verl-valgen: a line\nverl-valgen: and another\n"


def test_a_row_beyond_the_files_ends_the_program_before_a_trainer_is_made(config, calls, capsys, monkeypatch):
    monkeypatch.setattr(SmallHost, "num_validation_rows", staticmethod(lambda config: 20), raising=False)
    generation = {"rows": [3, 20], "n": 0}
    with pytest.raises(SystemExit) as ended:
        Program().run(OmegaConf.create({"generation": generation}))
    assert ended.value.code == 2
    assert [line.partition(", got ")[2] for line in capsys.readouterr().err.splitlines()] == ["0", "row 20"]
    config.generation.rows = [20]  # which own prompts replace
    assert Program().run(config)._rounds.settings.rows == [20]


def test_a_misspelt_variable_ends_the_program_with_generation_off_too(calls, capsys, monkeypatch):
    monkeypatch.setenv("VERL_GENERATION_ENABELD", "true")
    with pytest.raises(SystemExit):
        Program().run(OmegaConf.create({}))
    assert "did you mean VERL_GENERATION_ENABLED?" in capsys.readouterr().err


def test_a_configuration_that_a_trainer_changes_is_read_anew(config, calls):
    class Changing(Own):
        def __init__(self, config: DictConfig) -> None:
            config.generation.top_k = 9
            super().__init__(config)

    assert Program().run(config, Changing)._rounds.settings.top_k == 9


def test_a_backend_is_looked_for_with_generation_off_too(calls):
    with pytest.raises(ConfigError, match=r"generation\.backend must be one of auto, hf, fast, vllm, got 'nosuch'"):
        Own(OmegaConf.create({"generation": {"enabled": False, "backend": "nosuch"}}))


@pytest.mark.parametrize("fails", [False, True])
def test_rounds_that_did_not_come_are_told_while_the_rounds_are_open_unless_training_failed(config, calls, fails):
    events = []

    class Rounds(nullcontext):
        @contextmanager
        def told_if_missing(self) -> Iterator[None]:
            yield
            events.append("missing")

        def __exit__(self, *args: Any) -> None:
            events.append("end")

    class Fitting(VerlsTrainer):
        def fit(self) -> int:
            events.append("fit")
            return 1 // (not fails)

    class OwnFitting(mixin.ValidationGenerationMixin, Fitting):
        pass

    trainer = OwnFitting(config)
    trainer._rounds = Rounds()  # type: ignore[assignment]
    if fails:
        with pytest.raises(ZeroDivisionError):
            trainer.fit()
    else:
        assert trainer.fit() == 1
    assert events == (["fit", "end"] if fails else ["fit", "missing", "end"])


@pytest.mark.parametrize("is_spmd", [True, False])
def test_a_driver_is_the_first_of_one_whatever_started_it_says(config, calls, capsys, monkeypatch, is_spmd):
    """SLURM and Kubernetes set such variables for every job."""
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    asked: list[int] = []
    monkeypatch.setattr(SmallHost, "is_spmd", is_spmd)
    monkeypatch.setattr(SmallHost, "why_validation_will_crash", staticmethod(lambda config, num: asked.append(num)))
    Program().run(config)
    assert asked == [8 if is_spmd else 1]
    assert logging.getLogger("verl_valgen").level == (logging.WARNING if is_spmd else logging.INFO)
    config.generation.top_k = -5
    with pytest.raises(SystemExit):
        Program().run(config)
    assert ("verl-valgen: " in capsys.readouterr().err) == (not is_spmd)
