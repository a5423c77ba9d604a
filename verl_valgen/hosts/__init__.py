"""Hosts: verl's SFT trainers, each seen through the same sets of names (`trainer_host.TrainerHost`, `ModelHost`).

A host says where its trainer keeps model, loaders, tokenizer, step and rank, and what that trainer needs to run here.
Hosts know verl; nothing else does. A new one is a module in this folder and a line in `HOSTS`.
"""

from __future__ import annotations

import sys
from pathlib import PurePath
from pkgutil import resolve_name
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verl_valgen.hosts.trainer_host import TrainerHost

HOSTS = {
    "verl.trainer.fsdp_sft_trainer": "verl_valgen.hosts.fsdp_sft:FSDPSFTHost",
    "verl.trainer.sft_trainer": "verl_valgen.hosts.sft:SFTHost",
    "verl.trainer.sft_trainer_ray": "verl_valgen.hosts.sft_ray:RaySFTHost",
}
"""The module of each of verl's trainers, and "module:class" of the host for it."""


def load_host_class(verl_module: str) -> type[TrainerHost]:
    """Imports the host for one of verl's modules, a key of `HOSTS`."""
    host_class: type[TrainerHost] = resolve_name(HOSTS[verl_module])
    return host_class


def host_class_for(trainer_class: type) -> tuple[type[TrainerHost], ModuleType]:
    """Finds the host for a trainer class, and the module that defines the verl class it derives from.

    Raises:
        TypeError: `trainer_class` derives from none of verl's SFT trainers that have a host.
    """
    for verl_module in HOSTS:
        host_class = load_host_class(verl_module)
        # `python -m verl.trainer...` runs the module under the name `__main__`.
        module_names = {verl_module, "__main__"} if is_main_module(verl_module) else {verl_module}
        for cls in trainer_class.__mro__:
            if cls.__name__ == host_class.trainer_name and cls.__module__ in module_names:
                return host_class, sys.modules[cls.__module__]
    raise TypeError(f"{trainer_class.__name__} must derive from one of verl's trainers in {', '.join(HOSTS)}")


def is_main_module(name: str) -> bool:
    """Whether the running program is the module `name`, started by `python -m` or by its file."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name == name
    file = getattr(main, "__file__", None)  # absent under `python -c` and at a prompt
    expected = PurePath(f"{name.replace('.', '/')}.py").parts
    return file is not None and PurePath(file).parts[-len(expected) :] == expected
