"""The rooms of the package: what each may import, no circles, and few floors.

Classes that are named by "module:Class" (backends, hosts, trackers, metrics) are resolved when a run asks for them, and
count as no import here.
"""

from __future__ import annotations

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import verl_valgen

PACKAGE = Path(verl_valgen.__file__).parent

LEVELS = (
    {"settings"},
    {"records", "text", "collectives", "patching"},
    {"viewing"},
    {"prompts", "weights", "backends", "scores", "trackers"},
    {"hosts"},
    {"rounds"},
    {"activation", "mixin", "__main__"},
)
"""Rooms from low to high. A room imports lower ones, and none of its own level but those in `ALLOWED`."""

ALLOWED = {("backends", "weights")}
"""Imports between rooms of one level."""

MAX_FLOORS = 9


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").replace("__init__", "")


def is_for_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(node: ast.AST):
    """All nodes, those within functions too, but for what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not is_for_typing(child):
            yield child
            yield from statements(child)


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, by their names within the package."""
    modules = {name_of(path): path for path in PACKAGE.rglob("*.py") if name_of(path)}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets = set()
        for node in statements(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} has a relative import, which this test would not follow"
            if isinstance(node, ast.ImportFrom) and node.module.startswith("verl_valgen"):
                base = node.module.removeprefix("verl_valgen").lstrip(".")
                for alias in node.names:
                    inner = f"{base}.{alias.name}".lstrip(".")
                    targets.add(inner if inner in modules else base)
            elif isinstance(node, ast.Import):
                targets |= {
                    alias.name.removeprefix("verl_valgen.") for alias in node.names if "verl_valgen" in alias.name
                }
        found[name] = {target for target in targets if target in modules and target != name}
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def level(module: str) -> int:
    return next(number for number, rooms in enumerate(LEVELS) if room(module) in rooms)


def test_every_module_has_a_room():
    rooms = {room(module) for module in imports()}
    assert rooms == set().union(*LEVELS)


@pytest.mark.parametrize("module", imports())
def test_imports_go_down(module):
    for target in imports()[module]:
        is_allowed = (
            room(target) == room(module)
            or level(target) < level(module)
            or (room(module), room(target)) in ALLOWED
            or (level(module) == level(target) == 1 and room(module) != "records" and room(target) != "records")
            or (level(module) == level(target) == len(LEVELS) - 1)
        )
        assert is_allowed, f"{module} imports {target}"


def test_records_import_settings_alone():
    assert {room(target) for target in imports()["records"]} <= {"settings"}


def test_no_circle_between_files_or_folders():
    TopologicalSorter(imports()).prepare()  # raises CycleError
    folders: dict[str, set[str]] = {}
    for module, targets in imports().items():
        folders.setdefault(room(module), set()).update(room(target) for target in targets)
    TopologicalSorter({name: targets - {name} for name, targets in folders.items()}).prepare()


def test_there_are_few_floors():
    @functools.cache
    def chain(module: str) -> tuple[str, ...]:
        return (module, *max((chain(target) for target in imports()[module]), key=len, default=()))

    longest = max((chain(module) for module in imports()), key=len)
    assert len(longest) <= MAX_FLOORS, " -> ".join(longest)


def test_vllm_is_imported_within_functions_of_its_backend_alone():
    """What is loaded with the package, or by another backend, must not load it."""

    def imports_vllm(node: ast.AST) -> bool:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        return any(name.partition(".")[0] == "vllm" for name in names)

    found = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_bytes())
        within = [f for f in statements(tree) if isinstance(f, ast.FunctionDef)]
        allowed = {id(node) for function in within for node in statements(function)}
        importing = [node for node in statements(tree) if imports_vllm(node)]
        assert all(id(node) in allowed for node in importing), path
        found |= {path.parent for _ in importing}
    assert found == {PACKAGE / "backends" / "vllm"}
