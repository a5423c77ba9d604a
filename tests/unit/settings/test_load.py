"""The contract of the settings: precedence, switches, limits, and the wording of every error."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from end_to_end.trainer import CONFIG_NAME
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_valgen.settings.load import SETTINGS, ConfigError, GenerationSettings, load_settings, task_overrides

OUR_CONFIG = Path(__file__).parents[3] / "config"
VARIABLES = [setting.variable for setting in SETTINGS.values() if setting.variable]
OWN_KEYS = [key for key in SETTINGS if key.partition(".")[2] in GenerationSettings.__dataclass_fields__]


def verl_folder() -> Path:
    spec = importlib.util.find_spec("verl")  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("verl is not installed")
    return Path(spec.submodule_search_locations[0])


def load_with_hydra(
    *overrides: str, environ: dict[str, str] | None = None, with_generation: bool = True
) -> GenerationSettings:
    """Composes as verl's trainer does, with verl's and our folder on the search path."""
    folders = [OUR_CONFIG, verl_folder() / "trainer" / "config"]
    config_name = CONFIG_NAME
    if with_generation:
        config_name += "_with_generation"
    else:
        folders.reverse()
    search_path = f"hydra.searchpath=[file://{folders[1]}]"
    with initialize_config_dir(config_dir=str(folders[0]), version_base=None):
        config = compose(config_name, [search_path, *overrides], return_hydra_config=True)
    return load_settings(config, environ or {}, list(config.hydra.overrides.task))


def load(block: object = None, environ: dict[str, str] | None = None, **trainer: object) -> GenerationSettings:
    return load_settings({"generation": block, "trainer": trainer}, environ or {})


def message(block: object = None, environ: dict[str, str] | None = None, **trainer: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(block, environ, **trainer)
    return str(caught.value)


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

    @pytest.mark.parametrize("key", [key for key in OWN_KEYS if SETTINGS[key].variable])
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


class TestYaml:
    @pytest.mark.parametrize("environ", [{}, {"VERL_GENERATION_TOP_P": "", "VERL_GENERATION_TEMPRATURE": " "}])
    def test_defaults_equal_dataclass_defaults(self, environ):
        assert load_with_hydra(environ=environ) == GenerationSettings(enabled=True)

    def test_every_key_stands_in_the_default_group(self):
        block = OmegaConf.load(OUR_CONFIG / "generation" / "default.yaml")
        assert {f"generation.{name}" for name in block} | {"trainer.max_val_samples"} == set(OWN_KEYS)

    @pytest.mark.parametrize("path", sorted((OUR_CONFIG / "generation").glob("*.yaml")), ids=lambda path: path.stem)
    def test_groups_load_and_say_what_they_are_for(self, path):
        assert load_with_hydra(f"generation={path.stem}").enabled
        assert path.read_text().startswith("# ")


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
        ("block", "expected"),
        [
            ({"enabled": 1}, "generation.enabled must be a boolean (true or false), got 1"),
            ({"do_sample": "maybe"}, "generation.do_sample must be a boolean (true or false), got 'maybe'"),
            ({"do_sample": None}, "generation.do_sample must be a boolean (true or false), got None"),
            (
                {"temperature": 0},
                "generation.temperature must be a number > 0 (for greedy decoding set do_sample=false)",
            ),
            ({"temperature": -1}, "generation.temperature must be a number > 0"),
            ({"temperature": True}, "generation.temperature must be a number > 0"),
            ({"temperature": math.nan}, "got nan"),
            ({"temperature": math.inf}, "got inf"),
            ({"temperature": "nan"}, "got 'nan'"),
            ({"temperature": "1e999"}, "got '1e999'"),
            ({"temperature": 10**400}, "generation.temperature must be a number > 0"),
            ({"temperature": 10**5000}, "got int that cannot be shown"),
            ({"top_k": -1}, "generation.top_k must be an integer >= 0 (0 switches it off), got -1"),
            ({"top_k": 5.0}, "generation.top_k must be an integer >= 0 (0 switches it off), got 5.0"),
            ({"top_k": "5_0"}, "got '5_0'"),
            ({"top_k": "٥"}, r"got '\u0665'"),
            ({"top_k": None}, "got None"),
            ({"top_p": 1.5}, "generation.top_p must be a number in (0, 1], got 1.5"),
            ({"top_p": 0}, "generation.top_p must be a number in (0, 1], got 0"),
            ({"top_p": [0.5]}, "generation.top_p must be a number in (0, 1], got [0.5]"),
            ({"max_new_tokens": 0}, "generation.max_new_tokens must be an integer >= 1, got 0"),
            ({"max_new_tokens": False}, "generation.max_new_tokens must be an integer >= 1, got False"),
            ({"seed": -1}, "generation.seed must be an integer in [0, 2**63), got -1"),
            ({"seed": 2**63}, "generation.seed must be an integer in [0, 2**63), got 9223372036854775808"),
            ({"dtype": "int8"}, "generation.dtype must be one of auto, float32, bfloat16, float16, fp32, bf16, fp16"),
            ({"backend": 3}, "generation.backend must be one of auto, hf, fast, got 3"),
            ({"max_log_chars": 3}, "generation.max_log_chars must be an integer >= 16, got 3"),
            ({"max_tracker_chars": 3}, "generation.max_tracker_chars must be an integer >= 16, got 3"),
            ({"min_p": 2}, "generation.min_p must be a number in [0, 1], got 2"),
            ({"repetition_penalty": 0}, "generation.repetition_penalty must be a number > 0, got 0"),
            ({"stop_strings": [""]}, "generation.stop_strings must be a text or a list of texts, none of them empty"),
            (
                {"suppress_tokens": [math.nan]},
                "generation.suppress_tokens must be free of NaN and infinity, and of what",
            ),
            ({"temprature": 3}, "unknown key generation.temprature: did you mean generation.temperature?"),
            ({"topk": 3}, "unknown key generation.topk: did you mean generation.top_k?"),
            ({"typicalp": 3}, "unknown key generation.typicalp: did you mean generation.typical_p?"),
            ({"max_val_samples": 0}, "unknown key generation.max_val_samples: did you mean trainer.max_val_samples?"),
            ({"frobnicate": 3}, "unknown key generation.frobnicate: transformers.GenerationConfig has no such field"),
            ({"a.b": 3}, "unknown key generation.a.b"),
            ({1: 3}, "unknown key generation.1"),
            ({"transformers_version": "4"}, "unknown key generation.transformers_version"),
            ({"_from_model_config": True}, "unknown key generation._from_model_config"),
            (
                {"num_beams": 2},
                "generation.num_beams must be 1 with do_sample=true, got 2: beam sampling draws from torch",
            ),
            ({"early_stopping": [1]}, "generation: transformers refuses these parameters: "),
            ({"watermarking_config": 5}, "generation: transformers refuses these parameters: "),
            ({"cache_implementation": "x"}, "generation: transformers refuses these parameters: Invalid `cache_impl"),
            ({"top_k": "${nowhere}"}, "generation.top_k cannot be read: Interpolation key 'nowhere' not found"),
            ({"top_k": "???"}, "generation.top_k cannot be read: Missing mandatory value"),
            ({"top_k": "${"}, "the configuration cannot be read: "),
            ([1], "generation must be a mapping of names to values, got [1]"),
            ("greedy", "generation must be a mapping of names to values, got 'greedy'"),
            ({(1,): 3}, "the configuration cannot be read: "),
        ],
        ids=lambda value: ascii(value)[:60] if isinstance(value, str) else "",
    )
    def test_block(self, block, expected):
        assert expected in message(block)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("custom_generate", "it would load or run code from outside this run"),
            ("trust_remote_code", "it would load or run code from outside this run"),
            ("assistant_model", "it would load or run code from outside this run"),
            ("logits_processor", "it would load or run code from outside this run"),
            ("num_return_sequences", "set generation.n"),
            ("return_dict_in_generate", "only the generated text is kept"),
            ("output_scores", "only the generated text is kept"),
            ("penalty_alpha", "it belongs to a generation mode whose code transformers loads from the hub"),
            ("num_beam_groups", "it belongs to a generation mode whose code transformers loads from the hub"),
            ("diversity_penalty", "it belongs to a generation mode whose code transformers loads from the hub"),
            ("constraints", "it belongs to a generation mode whose code transformers loads from the hub"),
            ("force_words_ids", "it belongs to a generation mode whose code transformers loads from the hub"),
            ("dola_layers", "it belongs to a generation mode whose code transformers loads from the hub"),
            ("prompt_lookup_num_tokens", "assisted decoding cannot answer prompts in batches"),
            ("num_assistant_tokens", "assisted decoding cannot answer prompts in batches"),
            ("compile_config", "it is the backend that decides about compilation"),
            ("max_length", "it counts the prompt too; set generation.max_new_tokens"),
        ],
    )
    def test_refused(self, name, reason):
        assert message({name: None}) == f"generation.{name} is not supported: {reason}"

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

    def test_a_mode_that_moved_to_the_hub(self, monkeypatch):
        from transformers.generation import utils

        if not hasattr(utils, "GENERATION_MODES_MAPPING"):
            pytest.skip("this transformers keeps all modes to itself")
        moved = dict.fromkeys(utils.GENERATION_MODES_MAPPING, "somebody/beam-search")
        monkeypatch.setattr(utils, "GENERATION_MODES_MAPPING", moved)
        assert "select beam_search, but" in message({"num_beams": 2, "do_sample": False})
        monkeypatch.delattr(utils, "GENERATION_MODES_MAPPING")
        assert load({"num_beams": 2, "do_sample": False}).extra == {"num_beams": 2}


class TestSettings:
    def test_construction_checks_and_normalises(self):
        made = GenerationSettings(enabled=True, temperature=1, dtype="BF16", extra={"min_p": "0.1", "typical_p": None})
        assert (made.temperature, made.dtype, made.extra) == (1.0, "bfloat16", {"min_p": 0.1})
        with pytest.raises(ConfigError, match=r"generation\.seed must be"):
            GenerationSettings(enabled=True, seed=-1)

    def test_parameters_are_those_in_force(self):
        common = {"max_new_tokens": 100, "repetition_penalty": 1.1}
        extra = {"min_p": 0.1, "repetition_penalty": 1.1}
        sampling = GenerationSettings(enabled=True, extra=extra).parameters
        assert sampling == {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.7, "min_p": 0.1, **common}
        assert GenerationSettings(enabled=True, do_sample=False, extra=extra).parameters == {
            "do_sample": False,
            **common,
        }

    def test_greedy_decoding_makes_no_warnings(self, caplog, capsys):
        load({"do_sample": False, "temperature": 0.3, "min_p": 0.2})
        assert (caplog.text, *capsys.readouterr()) == ("", "", "")

    def test_texts_from_interpolations_are_read_as_variables_are(self, monkeypatch):
        monkeypatch.setenv("MY_TEMPERATURE", "0.5")
        assert load({"temperature": "${oc.env:MY_TEMPERATURE}"}).temperature == 0.5

    def test_nested_parameters_arrive_as_plain_python(self):
        block = OmegaConf.create({"bad_words_ids": [[1, 2]], "eos_token_id": [1, "${generation.top_k}"], "top_k": 7})
        loaded = load_settings(OmegaConf.create({"generation": block}), {})
        assert loaded.extra == {"bad_words_ids": [[1, 2]], "eos_token_id": [1, 7]}
        assert type(loaded.extra["bad_words_ids"][0]) is list


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
    assert refusal.isascii()
    assert len(refusal) < 600
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

    names = [*vars(GenerationConfig()), *(key.partition(".")[2] for key in OWN_KEYS), "surprise"]
    block = data.draw(VALUES | st.dictionaries(st.sampled_from(names) | st.text(), VALUES, max_size=3))
    trainer = data.draw(st.just({}) | st.fixed_dictionaries({"max_val_samples": VALUES}) | VALUES)
    parses_or_refuses({"generation": block, "trainer": trainer}, {})


def test_metrics_files_and_strategies_are_checked_at_start(tmp_path):
    strategies = {"hot": {"temperature": 2, "best_of": 3}, "plain": None}
    (tmp_path / "own.txt").write_text("a\n")
    block = {"strategies": strategies, "metrics": "exact_match", "best_metric": "hot/exact_match_best", "n": 2}
    loaded = load(block | {"prompts": f"{tmp_path}/own.txt"})
    assert loaded.strategies == {"hot": {"temperature": 2, "best_of": 3}, "plain": {}}
    assert (loaded.metrics, loaded.prompts) == (["exact_match"], f"{tmp_path}/own.txt")
    assert load({"strategies": None, "metrics": None, "prompts": None, "best_metric": None}) == load({})


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"strategies": {"hot": {"temprature": 2}}}, "unknown key generation.strategies.hot.temprature: did you mean"),
        ({"strategies": {"hot": {"temperature": 0}}}, "generation.strategies.hot.temperature must be a number > 0"),
        ({"strategies": {"hot": {"n": 2}}}, "generation.strategies.hot: n is set once for the run, as generation.n"),
        ({"strategies": {"x": {"num_beams": 2}}}, "generation.strategies.x.num_beams must be 1 with do_sample=true"),
        ({"strategies": {"x": {"do_sample": None}}}, "generation.strategies.x.do_sample must be a boolean"),
        (
            {"strategies": {"x": {"penalty_alpha": 0.6}}},
            "generation.strategies.x.penalty_alpha is not supported: it be",
        ),
        (
            {"strategies": {"a/b": {}}},
            "generation.strategies must be a mapping of names (letters, digits, _ and -; not by_",
        ),
        ({"strategies": {"by_source": {}}}, "generation.strategies must be a mapping of names"),
        ({"strategies": {"a": 3}}, "generation.strategies must be a mapping of names"),
        ({"strategies": ["a"]}, "generation.strategies must be a mapping of names"),
        ({"metrics": ["blue"]}, "generation.metrics must be names (exact_match, "),
        ({"metrics": [3]}, "generation.metrics must be a list of texts, none empty, got [3]"),
        ({"prompts": "/nowhere.txt"}, "generation.prompts: /nowhere.txt: there is no such file"),
        ({"prompts_mode": "add"}, "generation.prompts_mode must be one of replace, append, got 'add'"),
        ({"turn": "second"}, "generation.turn must be one of last, first, all, got 'second'"),
        ({"every": 0}, "generation.every must be an integer >= 1, got 0"),
        ({"best_of": 0}, "generation.best_of must be an integer >= 1, got 0"),
        ({"params_key": ""}, "generation.params_key must be a text that is not empty, got ''"),
        ({"best_metric": "bleu"}, "generation.best_metric must be one of num_new_tokens, cut_off, empty, "),
        ({"best_metric": "exact_match_bset", "metrics": ["exact_match"]}, "got 'exact_match_bset'"),
        ({"strategies": {"best": {}}}, "generation.strategies: a round has a number called best already"),
        ({"strategies": {"bleu": {}}, "metrics": ["bleu"]}, "a round has a number called bleu already"),
        ({"best_metric": "x/empty"}, "alone or as <strategy>/<metric>, got 'x/empty'"),
    ],
)
def test_what_is_named_wrongly_is_refused(block, expected):
    assert expected in message(block)


def test_with_generation_off_nothing_that_is_named_is_looked_for():
    block = {"enabled": False, "metrics": ["/nowhere.py:f"], "prompts": "/nowhere.txt"}
    assert not load_settings({"generation": block}, {}, read_when_off=True).enabled
