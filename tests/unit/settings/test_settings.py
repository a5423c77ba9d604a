"""The declared keys: defaults, bounds, the wording of every error, and the parameters in force."""

from __future__ import annotations

import math

import pytest
from omegaconf import OmegaConf
from unit.settings.loading import OUR_CONFIG, load, load_with_hydra, message

from verl_valgen.settings.load import SETTINGS, ConfigError, GenerationSettings, load_settings


class TestYaml:
    @pytest.mark.parametrize("environ", [{}, {"VERL_GENERATION_TOP_P": "", "VERL_GENERATION_TEMPRATURE": " "}])
    def test_defaults_equal_dataclass_defaults(self, environ):
        assert load_with_hydra(environ=environ) == GenerationSettings(enabled=True)

    @pytest.mark.parametrize(
        ("override", "rows"),
        [("first", "first"), ("[3,7]", [3, 7]), ("{per_source: 2}", {"per_source": 2})],
    )
    def test_rows_of_every_kind_can_be_set_on_the_command_line(self, override, rows):
        assert load_with_hydra(f"generation.rows={override}").rows == rows
        assert load_with_hydra(f"+generation.rows={override}", with_generation=False).rows == rows

    def test_every_key_stands_in_the_default_group(self):
        block = OmegaConf.load(OUR_CONFIG / "generation" / "default.yaml")
        assert {f"generation.{name}" for name in block} | {"trainer.max_val_samples"} == SETTINGS.keys()

    @pytest.mark.parametrize("path", sorted((OUR_CONFIG / "generation").glob("*.yaml")), ids=lambda path: path.stem)
    def test_groups_load_and_say_what_they_are_for(self, path):
        assert load_with_hydra(f"generation={path.stem}").enabled
        assert path.read_text().startswith("# ")


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
            ({"metrics": [3]}, "generation.metrics must be a list of texts, none empty, got [3]"),
            ({"prompts_mode": "add"}, "generation.prompts_mode must be one of replace, append, got 'add'"),
            ({"turn": "second"}, "generation.turn must be one of last, first, all, got 'second'"),
            ({"reasoning": False}, "generation.reasoning must be one of keep, strip, got False"),
            ({"reasoning_end": ["</think>"]}, "generation.reasoning_end must be"),
            ({"reference": "truth"}, "generation.reference must be one of trained, ground_truth, got 'truth'"),
            ({"every": 0}, "generation.every must be an integer >= 1, got 0"),
            ({"best_of": 0}, "generation.best_of must be an integer >= 1, got 0"),
            ({"params_key": ""}, "generation.params_key must be a text that is not empty, got ''"),
            ({"seed": -1}, "generation.seed must be an integer in [0, 2**63), got -1"),
            ({"seed": 2**63}, "generation.seed must be an integer in [0, 2**63), got 9223372036854775808"),
            ({"dtype": "int8"}, "generation.dtype must be one of auto, float32, bfloat16, float16, fp32, bf16, fp16"),
            ({"backend": 3}, "generation.backend must be a name, got 3"),
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


class TestSettings:
    def test_a_setting_is_declared_whole(self):
        for key, declared in SETTINGS.items():
            assert key.rpartition(".")[2] == declared.name
            assert declared.meaning
        variables = [declared.variable for declared in SETTINGS.values() if declared.variable]
        assert len(variables) == len(set(variables)) == 8

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


class TestStrategies:
    def test_they_are_parameters_by_name(self):
        loaded = load({"strategies": {"hot": {"temperature": 2, "best_of": 3}, "plain": None}})
        assert loaded.strategies == {"hot": {"temperature": 2, "best_of": 3}, "plain": {}}
        assert load({"strategies": None, "metrics": None, "prompts": None, "best_metric": None}) == load({})

    @pytest.mark.parametrize(
        ("strategies", "expected"),
        [
            (
                {"hot": {"temprature": 2}},
                "unknown key generation.strategies.hot.temprature: did you mean generation.strategies.hot.temperature?",
            ),
            (
                {"hot": {"bestof": 2}},
                "unknown key generation.strategies.hot.bestof: did you mean generation.strategies.hot.best_of?",
            ),
            (
                {"hot": {"minp": 2}},
                "unknown key generation.strategies.hot.minp: did you mean generation.strategies.hot.min_p?",
            ),
            (
                {"hot": {"frobnicate": 2}},
                "unknown key generation.strategies.hot.frobnicate: transformers.GenerationConfig has no such field",
            ),
            ({"hot": {"temperature": 0}}, "generation.strategies.hot.temperature must be a number > 0"),
            ({"hot": {"n": 2}}, "generation.strategies.hot: n is set once for the run, as generation.n"),
            (
                {"hot": {"max_val_samples": 2}},
                "generation.strategies.hot: max_val_samples is set once for the run, as trainer.max_val_samples",
            ),
            ({"x": {"num_beams": 2}}, "generation.strategies.x.num_beams must be 1 with do_sample=true"),
            ({"x": {"do_sample": None}}, "generation.strategies.x.do_sample must be a boolean"),
            ({"x": {"penalty_alpha": 0.6}}, "generation.strategies.x.penalty_alpha is not supported: it belongs"),
            ({"a/b": {}}, "generation.strategies must be a mapping of names (letters, digits, _ and -; not by_"),
            ({"by_source": {}}, "generation.strategies must be a mapping of names"),
            ({"a": 3}, "generation.strategies must be a mapping of names"),
            (["a"], "generation.strategies must be a mapping of names"),
        ],
    )
    def test_errors(self, strategies, expected):
        assert message({"strategies": strategies}).startswith(expected)

    def test_what_overrides_adds_to_what_is_there_and_null_unsets(self):
        base = GenerationSettings(enabled=True, extra={"min_p": 0.1, "typical_p": 0.9})
        changed = base.overridden({"top_k": "7", "min_p": None, "repetition_penalty": 1.1}, "here")
        assert changed.top_k == 7
        assert changed.extra == {"typical_p": 0.9, "repetition_penalty": 1.1}
        assert base.overridden({}, "here") is base

    def test_all_mistakes_of_a_rows_parameters_are_told(self):
        with pytest.raises(ConfigError) as caught:
            GenerationSettings(enabled=True).overridden({"topk": 1, "top_p": 2, 3: 4}, "generation_params")
        assert str(caught.value).split("\n") == [
            "unknown key generation_params.topk: did you mean generation_params.top_k?",
            "generation_params.top_p must be a number in (0, 1], got 2",
            "unknown key generation_params.3: transformers.GenerationConfig has no such field",
        ]
