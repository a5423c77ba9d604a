"""Settings as the tests load them: from plain mappings, and composed by Hydra as verl's trainers do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from end_to_end.trainer import CONFIG_NAME
from hydra import compose, initialize_config_dir

from verl_valgen.settings.load import SETTINGS, ConfigError, GenerationSettings, load_settings

OUR_CONFIG = Path(__file__).parents[3] / "config"
VARIABLES = [setting.variable for setting in SETTINGS.values() if setting.variable]


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


def mistakes(block: object = None, environ: dict[str, str] | None = None, **trainer: object) -> list[str]:
    """The lines of the error."""
    return message(block, environ, **trainer).split("\n")
