"""verl's SFT trainers, one module each: where its model, loaders, tokenizer, step and rank are, what it takes to run.

Hosts know verl; nothing else does. A new one is a module here and a line in `HOSTS`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import PurePath
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verl_valgen.hosts.base import Host

HOSTS = {
    "verl.trainer.fsdp_sft_trainer": "verl_valgen.hosts.fsdp_sft:FSDPSFTHost",
    "verl.trainer.sft_trainer": "verl_valgen.hosts.sft:SFTHost",
}
"""verl's module -> "module:class" of its host."""


def load_host_class(verl_module: str) -> type[Host]:
    module, _, attribute = HOSTS[verl_module].partition(":")
    return getattr(import_module(module), attribute)


def host_class_for(trainer_class: type) -> tuple[type[Host], ModuleType]:
    """The host of a trainer class and the module that its verl class was defined in.

    Raises:
        TypeError: `trainer_class` derives from none of verl's SFT trainers that are known here.
    """
    for verl_module in HOSTS:
        host_class = load_host_class(verl_module)
        # `python -m verl.trainer...` runs the module under the name of `__main__`.
        module_names = {verl_module, "__main__"} if is_main_module(verl_module) else {verl_module}
        for cls in trainer_class.__mro__:
            if cls.__name__ == host_class.trainer_name and cls.__module__ in module_names:
                return host_class, sys.modules[cls.__module__]
    raise TypeError(f"{trainer_class.__name__} must derive from one of verl's trainers in {', '.join(HOSTS)}")


def is_main_module(name: str) -> bool:
    """Whether the program that runs is this module, by `python -m` or by its file."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name == name
    file = getattr(main, "__file__", None)  # `python -c` and a prompt have none
    expected = PurePath(f"{name.replace('.', '/')}.py").parts
    return file is not None and PurePath(file).parts[-len(expected) :] == expected
