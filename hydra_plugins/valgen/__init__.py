"""Where Hydra finds verl-valgen: it loads every module below `hydra_plugins` in every program, so this stays small."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class ValidationGenerationPlugin(SearchPathPlugin):
    """Runs inside `@hydra.main`, before the task function; does nothing outside verl's own SFT trainers."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from verl_valgen.activation import activate

        activate(search_path)
