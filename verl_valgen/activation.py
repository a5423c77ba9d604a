"""When and how verl's own command gets the trainer that generates.

Hydra discovers `hydra_plugins.valgen` in every Hydra program of the environment and calls `activate` inside
`@hydra.main`, before the task function: verl's trainer class is defined by then and not yet looked up. Where the
program is one of verl's SFT trainers, its `run_sft` is wrapped; everywhere else nothing happens, and nothing is loaded.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from verl_valgen.hosts import HOSTS, host_class_for, is_main_module, load_host_class
from verl_valgen.patching import patched

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath
    from omegaconf import DictConfig

    from verl_valgen.hosts.trainer_host import TrainerHost
    from verl_valgen.rounds.preflight import Preflight

logger = logging.getLogger("verl_valgen")


def activate(search_path: ConfigSearchPath) -> None:
    """Prepares the running program if it is one of verl's SFT trainers."""
    verl_module = next((name for name in HOSTS if is_main_module(name)), None)
    if verl_module is None:
        return
    search_path.append("verl-valgen", f"file://{config_directory()}")
    # A user's YAML under `--config-path /anywhere` has verl's `sft_trainer` in its defaults.
    search_path.append("verl-valgen", "pkg://verl.trainer.config")

    main = sys.modules["__main__"]
    run_verl = main.run_sft
    if run_verl.__module__ == __name__:
        return  # Hydra makes a search path for every configuration that a program composes

    def run_sft(config: DictConfig) -> None:
        _run(config, load_host_class(verl_module), main, run_verl, trainer_class=None)

    main.run_sft = run_sft  # type: ignore[attr-defined]


def run_sft(config: DictConfig, trainer_class: type) -> None:
    """verl's own `run_sft` with another trainer class, for programs of one's own.

    Does for it what the package does for verl's command: checks the configuration first, supplies what torchrun would
    for a single process, and runs on CPU where there is no accelerator.

    Args:
        config: verl's configuration.
        trainer_class: Derives from one of verl's trainers.

    Raises:
        SystemExit: The configuration is wrong; the message has been printed, once per node.
        TypeError: `trainer_class` derives from none of verl's trainers.
    """
    host_class, module = host_class_for(trainer_class)
    _run(config, host_class, module, module.run_sft, trainer_class)


def _run(
    config: DictConfig,
    host_class: type[TrainerHost],
    module: ModuleType,
    run_verl: Callable[[DictConfig], None],
    trainer_class: type | None,
) -> None:
    from verl_valgen.settings.checks import ConfigError

    checked = _checked(config, host_class, generates_by_hand=trainer_class is not None)
    if trainer_class is None and checked is not None:
        trainer_class = _generating(getattr(module, host_class.trainer_name))
    if trainer_class is None and host_class.has_accelerator(module):
        return run_verl(config)
    # Where one process drives the others, variables of whatever started it say nothing of them.
    set_up_logging(is_first=not host_class.is_spmd or is_rank_zero())
    with ExitStack() as stack:
        if host_class.is_spmd:
            stack.enter_context(single_process_environment())
        stack.enter_context(host_class.launch_support(module, config))
        if trainer_class is not None:
            stack.enter_context(patched(module, host_class.trainer_name, trainer_class))
            stack.enter_context(patched(trainer_class, "_preflight", checked))
        try:
            return run_verl(config)
        except ConfigError as e:  # what only data and model could show
            _end_with(str(e).split("\n"), host_class)


def _checked(config: DictConfig, host_class: type[TrainerHost], *, generates_by_hand: bool) -> Preflight | None:
    """The checked configuration; None where generation is off, in which case nothing that generates is loaded.

    Raises:
        SystemExit: The configuration is wrong; each mistake has been printed, once per node.
    """
    from verl_valgen.settings.checks import Mistakes
    from verl_valgen.settings.load import load_settings, task_overrides

    mistakes, checked = Mistakes(), None
    settings = load_settings(config, os.environ, task_overrides(), read_when_off=generates_by_hand, mistakes=mistakes)
    if settings.enabled or generates_by_hand:
        from verl_valgen.rounds.preflight import check_names, check_rows

        checked = check_names(config, settings, mistakes)
    if settings.enabled and not generates_by_hand:  # a class of one's own may bring its own validation data
        num_ranks = int(os.environ.get("WORLD_SIZE", "1")) if host_class.is_spmd else 1
        if (reason := host_class.why_validation_will_crash(config, num_ranks)) is not None:
            mistakes.lines.append(reason)
        if isinstance(settings.rows, list):
            with mistakes.noted():
                check_rows(settings, host_class.num_validation_rows(config))
    if mistakes.lines:
        _end_with(mistakes.lines, host_class)
    return checked


def _end_with(lines: Sequence[str], host_class: type[TrainerHost]) -> NoReturn:
    # Once per node: each has an environment of its own.
    if not host_class.is_spmd or os.environ.get("LOCAL_RANK", "0") == "0":
        for line in lines:
            print(f"verl-valgen: {line}", file=sys.stderr)
    raise SystemExit(2) from None


def _generating(trainer_class: type) -> type:
    """verl's trainer with the mixin before it, under its own name."""
    from verl_valgen.mixin import ValidationGenerationMixin

    return type(trainer_class.__name__, (ValidationGenerationMixin, trainer_class), {})


@contextmanager
def single_process_environment() -> Iterator[None]:
    """Sets the variables of torchrun for a program that was started without it: one process, rendezvous with itself."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        yield
        return
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # port 0: any that is free
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def set_up_logging(*, is_first: bool = True) -> None:
    """Rank 0 logs at the level that verl's SFT trainers read as well, INFO unless set; the other ranks warn only.

    A handler is added only where the program has none: under Hydra it has. Lines go between those of progress bars.
    """
    from verl_valgen.viewing.beside_bars import log_beside_bars

    level = os.environ.get("VERL_SFT_LOGGING_LEVEL", "INFO")
    logger.setLevel(level if is_first else logging.WARNING)
    if not logger.hasHandlers():
        logging.basicConfig(format="[%(asctime)s][%(name)s][%(levelname)s] - %(message)s")
    log_beside_bars(logger)


def is_rank_zero() -> bool:
    """Whether this process is rank 0, told before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def config_directory() -> Path:
    """The folder of `sft_trainer_with_generation.yaml`: in the wheel inside the package, in a checkout beside it."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "config"
