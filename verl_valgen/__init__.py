"""Shows what a model says while verl's SFT trainers train it.

Importing this package loads neither torch nor verl, transformers or a tracker: its names are loaded when asked for.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_valgen.activation import run_sft
    from verl_valgen.mixin import ValidationGenerationMixin
    from verl_valgen.records import Sample
    from verl_valgen.settings.checks import ConfigError
    from verl_valgen.settings.settings import GenerationSettings

__version__ = "0.1.0"
__all__ = ["ConfigError", "GenerationSettings", "Sample", "ValidationGenerationMixin", "run_sft"]

_MODULES = {
    "ConfigError": "settings.checks",
    "GenerationSettings": "settings.settings",
    "Sample": "records",
    "ValidationGenerationMixin": "mixin",
    "run_sft": "activation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve_name(f"{__name__}.{_MODULES[name]}:{name}")
