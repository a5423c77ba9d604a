"""Where settings come from: precedence, switches, variables, and that all mistakes are told."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
from hydra.core.hydra_config import HydraConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.settings.loading import VARIABLES, load, load_with_hydra, message, mistakes, verl_folder

from verl_valgen.settings.checks import Mistakes
from verl_valgen.settings.load import SETTINGS, ConfigError, GenerationSettings, load_settings, task_overrides


class TestPrecedence:
    DEFAULT = GenerationSettings(enabled=True)

    @pytest.mark.parametrize(
        ("overrides", "environ", "expected"),
        [
            ([], {}, {}),
            ([], {"VERL_GENERATION_TOP_K": "7"}, {"top_k": 7}),
            (["generation=nucleus"], {}, {"top_k": 0, "top_p": 0.95}),
            (["generation=nucleus"], {"VERL_GENERATION_TOP_K": "7"}, {"top_k": 7, "top_p": 0.95}),
            (["generation.top_k=9"], {}, {"top_k": 9}),
            (["generation.top_k=9"], {"VERL_GENERATION_TOP_K": "7"}, {"top_k": 9}),
            (["++generation.top_k=9"], {"VERL_GENERATION_TOP_K": "7"}, {"top_k": 9}),
            (["generation={top_k: 9}"], {"VERL_GENERATION_TOP_K": "7"}, {"top_k": 9}),
            (["++generation={top_k: 9}"], {"VERL_GENERATION_TOP_K": "7"}, {"top_k": 9}),
            (["generation.top_k=9"], {"VERL_GENERATION_TOP_P": "0.2"}, {"top_k": 9, "top_p": 0.2}),
            (["generation=nucleus", "generation.top_k=9"], {"VERL_GENERATION_TOP_K": "7"}, {"top_k": 9, "top_p": 0.95}),
            (["generation.top_k=${trainer.nnodes}"], {"VERL_GENERATION_TOP_K": "7"}, {"top_k": 1}),
            (["~generation.top_k"], {}, {}),
            (["~generation.top_k"], {"VERL_GENERATION_TOP_K": "7"}, {"top_k": 7}),
            (["trainer.max_val_samples=3"], {}, {"max_val_samples": 3}),
            (["trainer.max_val_samples=3"], {"VERL_MAX_VAL_SAMPLES": "4"}, {"max_val_samples": 3}),
            ([], {"VERL_MAX_VAL_SAMPLES": "4"}, {"max_val_samples": 4}),
            (["++trainer={max_val_samples: 3}"], {"VERL_MAX_VAL_SAMPLES": "4"}, {"max_val_samples": 3}),
            (["+generation.min_p=0.1"], {}, {"extra": {"min_p": 0.1}}),
            (["+generation.min_p=null"], {}, {"extra": {}}),
            (["trainer.seed=5", "generation.seed=2"], {"VERL_GENERATION_SEED": "3"}, {"seed": 2}),
        ],
    )
    def test_with_our_config(self, overrides, environ, expected):
        assert load_with_hydra(*overrides, environ=environ) == dataclasses.replace(self.DEFAULT, **expected)

    @pytest.mark.parametrize(
        ("overrides", "environ", "expected"),
        [
            ([], {"VERL_GENERATION_TOP_K": "7"}, {"top_k": 7}),
            (["+generation.top_k=9"], {"VERL_GENERATION_TOP_K": "7"}, {"top_k": 9}),
            (["+generation.top_k=9", "+trainer.max_val_samples=3"], {}, {"top_k": 9, "max_val_samples": 3}),
            (["+generation=greedy"], {}, {"do_sample": False}),
            (["+generation=greedy"], {"VERL_GENERATION_DO_SAMPLE": "yes"}, {}),
            (
                ["+generation=greedy", "generation.do_sample=false"],
                {"VERL_GENERATION_DO_SAMPLE": "1"},
                {"do_sample": False},
            ),
        ],
    )
    def test_with_verls_config(self, overrides, environ, expected):
        loaded = load_with_hydra(*overrides, environ=environ, with_generation=False)
        assert loaded == dataclasses.replace(self.DEFAULT, **expected)

    @pytest.mark.parametrize("key", [key for key in SETTINGS if SETTINGS[key].variable])
    def test_every_variable_sets_its_key(self, key):
        text, value = {"enabled": ("true", True), "do_sample": ("OFF", False), "temperature": ("1e-1", 0.1)}.get(
            name := key.partition(".")[2], ("1", 1)
        )
        assert getattr(load(None, {SETTINGS[key].variable: text}), name) == value

    def test_a_variable_beats_yaml_and_names_itself(self):
        assert load({"top_k": 3}, {"VERL_GENERATION_TOP_K": " 7 "}).top_k == 7
        assert message({"top_k": 3}, {"VERL_GENERATION_TOP_K": "x"}).startswith("VERL_GENERATION_TOP_K must be")

    def test_the_value_that_loses_is_not_checked(self):
        assert load({"top_k": "broken"}, {"VERL_GENERATION_TOP_K": "7"}).top_k == 7

    def test_task_overrides_outside_hydra(self):
        assert not HydraConfig.initialized()
        assert task_overrides() == []


class TestSwitch:
    @pytest.mark.parametrize(
        ("block", "environ", "enabled"),
        [
            (None, {}, False),
            ({}, {}, True),
            ({"top_k": 3}, {}, True),
            ({"enabled": False}, {}, False),
            ({"enabled": False}, {"VERL_GENERATION_TOP_K": "3"}, False),
            ({"enabled": False}, {"VERL_GENERATION_ENABLED": "on"}, True),
            (None, {"VERL_GENERATION_ENABLED": "No"}, False),
            (None, {"VERL_GENERATION_ENABLED": ""}, False),
            ({"enabled": True}, {"VERL_GENERATION_ENABLED": "0"}, False),
            ({}, {"VERL_MAX_VAL_SAMPLES": "0"}, False),
            *((None, {variable: "1"}, True) for variable in VARIABLES),
        ],
    )
    def test_enabled(self, block, environ, enabled):
        assert load(block, environ).enabled is enabled

    def test_no_block_at_all(self):
        assert load_settings({}, {}) == GenerationSettings(enabled=False)
        assert not load_with_hydra(with_generation=False).enabled
        assert not load_with_hydra("~generation").enabled  # trainer.max_val_samples alone switches nothing on

    def test_zero_samples_switch_off(self):
        assert load({"top_k": 3}, max_val_samples=0) == GenerationSettings(enabled=False)

    @pytest.mark.parametrize(("enabled", "max_val_samples"), [(False, 2), (True, 0)])
    def test_values_are_read_when_off_for_whoever_generates_by_hand(self, enabled, max_val_samples):
        config = {"generation": {"enabled": enabled, "top_k": 3}, "trainer": {"max_val_samples": max_val_samples}}
        loaded = load_settings(config, {}, read_when_off=True)
        assert (loaded.enabled, loaded.top_k, loaded.max_val_samples) == (False, 3, max_val_samples)
        with pytest.raises(ConfigError, match=r"generation\.top_k must be"):
            load_settings({"generation": {"enabled": False, "top_k": -3}}, {}, read_when_off=True)

    def test_off_means_that_values_are_not_checked(self):
        block = {"enabled": False, "top_k": "x", "temperature": "${nowhere}", "temprature": "???"}
        environ = {"VERL_GENERATION_TOP_P": "7"}
        assert load(block, environ, max_val_samples="x") == GenerationSettings(enabled=False)

    def test_command_line_beats_the_variable(self):
        assert not load_with_hydra("generation.enabled=false", environ={"VERL_GENERATION_ENABLED": "true"}).enabled


class TestErrors:
    @pytest.mark.parametrize(
        ("environ", "expected"),
        [
            (
                {"VERL_GENERATION_DO_SAMPLE": "maybe"},
                "VERL_GENERATION_DO_SAMPLE must be a boolean (true or false), got 'maybe'",
            ),
            ({"VERL_GENERATION_TOP_K": "50.0"}, "VERL_GENERATION_TOP_K must be an integer >= 0"),
            ({"VERL_GENERATION_TOP_P": "inf"}, "VERL_GENERATION_TOP_P must be a number in (0, 1], got 'inf'"),
            (
                {"VERL_MAX_VAL_SAMPLES": "-1"},
                "VERL_MAX_VAL_SAMPLES must be an integer >= 0 (0 switches generation off)",
            ),
            (
                {"VERL_GENERATION_TEMPRATURE": "1"},
                "unknown environment variable VERL_GENERATION_TEMPRATURE: did you mean VERL_GENERATION_TEMPERATURE?",
            ),
            ({"VERL_GENERATION_MIN_P": "1"}, "VERL_GENERATION_MIN_P: it is set as ++generation.min_p=..."),
            ({"VERL_GENERATION_DTYPE": "1"}, "VERL_GENERATION_DTYPE: it is set as ++generation.dtype=..."),
            ({"VERL_GENERATION_MAX_VAL_SAMPLES": "1"}, "did you mean VERL_MAX_VAL_SAMPLES?"),
            ({"VERL_MAX_VAL_SAMPLE": "1"}, "did you mean VERL_MAX_VAL_SAMPLES?"),
            ({"VERL_MAX_SAMPLES": "1"}, "did you mean VERL_MAX_VAL_SAMPLES?"),
            ({"VERL_GENERATON_TOP_K": "1"}, "did you mean VERL_GENERATION_TOP_K?"),
            (
                {"VERL_GENERATION_FOO": "1"},
                "VERL_GENERATION_FOO: there are VERL_GENERATION_ENABLED, VERL_GENERATION_DO_S",
            ),
        ],
        ids=str,
    )
    def test_environment(self, environ, expected):
        assert expected in message({}, environ)

    def test_a_misspelt_variable_is_an_error_even_when_generation_is_off(self):
        assert "VERL_GENERATION_ENABLED?" in message({"enabled": False}, {"VERL_GENERATION_ENABELD": "true"})

    @pytest.mark.parametrize("value", [None, 2.0, True, "x", -1])
    def test_max_val_samples(self, value):
        expected = f"trainer.max_val_samples must be an integer >= 0 (0 switches generation off), got {value!r}"
        assert message({}, max_val_samples=value) == expected

    def test_command_line_errors_name_the_key(self):
        with pytest.raises(ConfigError, match=re.escape("generation.top_p must be a number in (0, 1], got 1.5")):
            load_with_hydra("generation.top_p=1.5", environ={"VERL_GENERATION_TOP_P": "0.5"})

    @pytest.mark.parametrize("hostile", ["\x1b[2J" + "x" * 10_000, "a\n" * 500, "\u202e\ud800'\""])
    def test_messages_are_short_and_ascii(self, hostile):
        for text in (
            message({"top_k": hostile}),
            message({hostile: 1}),
            message({}, {"VERL_GENERATION_TOP_K": hostile}),
        ):
            assert text.isascii()
            assert text.isprintable()
            assert len(text) < 250


ENVIRON = {"VERL_GENERATION_TOP_P": "1.5", "VERL_GENERATION_TEMPRATURE": "1", "VERL_MAX_VAL_SAMPLES": "-1"}


class TestSeveralMistakes:
    def test_all_are_told_one_line_each(self):
        block = {"top_k": -1, "temprature": 3, "min_p": 2, "strategies": {"hot": {"top_p": 2, "topk": 3}}}
        assert mistakes(block, ENVIRON) == [
            "unknown environment variable VERL_GENERATION_TEMPRATURE: did you mean VERL_GENERATION_TEMPERATURE?",
            "VERL_MAX_VAL_SAMPLES must be an integer >= 0 (0 switches generation off), got '-1'",
            "generation.top_k must be an integer >= 0 (0 switches it off), got -1",
            "unknown key generation.temprature: did you mean generation.temperature?",
            "generation.min_p must be a number in [0, 1], got 2",
            "VERL_GENERATION_TOP_P must be a number in (0, 1], got '1.5'",
            "generation.strategies.hot.top_p must be a number in (0, 1], got 2",
            "unknown key generation.strategies.hot.topk: did you mean generation.strategies.hot.top_k?",
        ]

    def test_with_a_switch_that_cannot_be_read_all_else_is_looked_at(self):
        lines = mistakes({"enabled": "perhaps", "top_k": -1})
        assert [line.split()[0] for line in lines] == ["generation.enabled", "generation.top_k"]

    def test_a_configuration_that_cannot_be_read_is_told_beside_the_variables(self):
        lines = mistakes([1], ENVIRON)
        assert lines[1:] == ["generation must be a mapping of names to values, got [1]"]
        assert "VERL_GENERATION_TEMPRATURE" in lines[0]

    @pytest.mark.parametrize(
        ("block", "sources"),
        [
            # Beside the default of what is wrong, others may not fit: nothing is said of them yet.
            ({"num_beams": 2, "do_sample": "no way"}, ["generation.do_sample"]),
            (
                {"do_sample": "no way", "strategies": {"beam": {"num_beams": 2}, "hot": {"top_p": 2}}},
                ["generation.do_sample", "generation.strategies.hot.top_p"],
            ),
            # The strategies would repeat it.
            ({"num_beams": 2, "strategies": {"hot": {"top_k": 2}}}, ["generation.num_beams"]),
            (
                {"strategies": {"a": {"num_beams": 2}, "b": {"do_sample": False, "num_beams": 2, "stop_strings": "x"}}},
                ["generation.strategies.a.num_beams", "generation.strategies.b.stop_strings"],
            ),
        ],
    )
    def test_what_follows_from_another_mistake_is_not_told(self, block, sources):
        assert [line.split()[0] for line in mistakes(block)] == sources

    def test_they_can_be_noted_for_more_to_be_checked(self):
        noted = Mistakes()
        loaded = load_settings({"generation": {"top_k": -1, "n": 3}}, {}, mistakes=noted)
        assert (loaded.enabled, loaded.top_k, loaded.n) == (True, GenerationSettings.top_k, 3)
        assert noted.lines == ["generation.top_k must be an integer >= 0 (0 switches it off), got -1"]
        with pytest.raises(ConfigError, match=r"generation\.top_k must be"):
            noted.raise_if_any()


# What verl reads, in versions from 0.5 to 0.9.
VERLS_VARIABLES = """
    VERL_AUTO_PADDING VERL_COMMIT VERL_DATAPROTO_SERIALIZATION_METHOD VERL_DELTA_WEIGHT_TRANSFER_BACKEND
    VERL_DISABLE_FLASH_ATTN_CE VERL_DISABLE_TRITON_FP8 VERL_ENABLE_TRACKER VERL_ENGINE_DEVICE VERL_ENGINE_VENDOR
    VERL_FILE_LOGGER_PATH VERL_FILE_LOGGER_ROOT VERL_FORCE_DEVICE VERL_FULL_DETERMINISM VERL_KEEP_NVTX_INJECTION
    VERL_LOGGING_LEVEL VERL_PLATFORM VERL_PPO_LOGGING_LEVEL VERL_PROFILE_PID VERL_PROFILE_RANK
    VERL_PROFILE_RAY_NSIGHT_DIR VERL_PROFILE_ROLE VERL_PROFILE_SAVE_PATH VERL_PROFILE_TOOL VERL_RAY_JOB_ID
    VERL_REPLAY_BUFFER_DEBUG_INTERVAL_SECONDS VERL_REPLICA_RANK VERL_RL_INSIGHT_ENABLE VERL_ROUTER_REPLAY_DEBUG
    VERL_SEED VERL_SFT_LOGGING_LEVEL VERL_TRACKER_HDFS_DIR VERL_TRACKER_VERBOSE VERL_USE_EXTERNAL_MODULES
    VERL_USE_EXTERNAL_PLUGINS VERL_USE_GPT_OSS VERL_USE_MODELSCOPE VERL_VLLM_ASCEND_GLM52_PATCH
    VERL_VLLM_DISTRIBUTED_BACKEND VERL_VLLM_FP8_QUANT_ENABLED VERL_VLLM_ZMQ_ADDRESSES VERL_ZMQ_BASE_TRAINER_RANK
""".split()  # noqa: SIM905


def test_verls_own_variables_are_left_alone():
    sources = (path.read_text(errors="replace") for path in verl_folder().rglob("*.py"))
    installed = {name for source in sources for name in re.findall(r"\bVERL_[A-Z0-9_]+", source)}
    assert installed
    environ = dict.fromkeys({*VERLS_VARIABLES, *installed, "PATH", "GENERATION_TOP_K", "MY_VERL_TOP_K"}, "1")
    assert load_settings({}, environ) == GenerationSettings(enabled=False)


def test_import_and_disabled_load_nothing_heavy():
    code = """
import sys
from verl_valgen.settings.load import load_settings
load_settings({"generation": {"enabled": False}, "trainer": {}}, {"VERL_SEED": "1"}, ["generation.enabled=false"])
print(sorted({"torch", "transformers", "verl", "ray", "wandb"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["???", "${", "${a}", "1e400"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def parses_or_refuses(config: dict[str, object], environ: dict[str, str]) -> None:
    try:
        loaded, refusal = load_settings(config, environ), ""
    except ConfigError as error:
        loaded, refusal = GenerationSettings(enabled=False), str(error)
    for line in refusal.split("\n"):
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < 600
    assert GenerationSettings(**vars(loaded)) == loaded  # what was accepted once is accepted again, unchanged


@pytest.mark.any_verl
@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(VARIABLES), st.text() | SCALARS.map(str), max_size=3))
def test_any_text_in_the_environment_parses_or_is_refused(environ):
    parses_or_refuses({}, environ)


@pytest.mark.any_verl
@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")).map("VERL_".__add__) | st.text().map("VERL_GENERATION_".__add__))
def test_any_variable_name_is_known_or_refused(name):
    parses_or_refuses({}, {name: "1"})


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_yaml_value_parses_or_is_refused(data):
    from transformers import GenerationConfig

    names = [*vars(GenerationConfig()), *(key.partition(".")[2] for key in SETTINGS), "surprise"]
    block = data.draw(VALUES | st.dictionaries(st.sampled_from(names) | st.text(), VALUES, max_size=3))
    trainer = data.draw(st.just({}) | st.fixed_dictionaries({"max_val_samples": VALUES}) | VALUES)
    parses_or_refuses({"generation": block, "trainer": trainer}, {})


class TestOverlap:
    @pytest.mark.parametrize("chosen", [{}, {"ranks": 1}, {"ranks": "auto"}, {"gather": "copy"}])
    def test_one_rank_with_a_copy_may_answer_beside_training(self, chosen):
        assert load({"overlap": True, **chosen}).overlap

    @pytest.mark.parametrize(
        ("chosen", "wrong"),
        [
            ({"gather": "sharded"}, "generation.gather must be auto or copy, got 'sharded'"),
            ({"ranks": 2}, "generation.ranks must be auto (rounds for which training waits may take more) or 1, got 2"),
        ],
    )
    def test_more_ranks_may_not(self, chosen, wrong):
        assert message({"overlap": True, **chosen}).endswith(wrong)
        assert not load({"overlap": False, **chosen}).overlap
