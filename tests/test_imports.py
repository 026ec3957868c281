"""Arrows run one way: what each room may import, read from its source."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import layer_tying

SOURCE = Path(layer_tying.__file__).parent
PACKAGE = "layer_tying"

# Each room with the rooms that it may import from. `dynamic` is a module, all others are packages.
BELOW = {
    "errors": set(),
    "settings": {"errors"},
    "files": {"errors"},
    "events": set(),
    "core": {"errors"},
    "policies": {"errors", "core"},
    "models": {"errors", "core", "settings"},
    "dynamic": {"errors", "core", "policies", "models"},
    "data": {"errors", "files", "settings"},
    "saving": {"errors", "files", "events", "core", "models", "data"},
    "integrations": {"errors", "core", "policies", "dynamic", "saving", "tasks"},
    "tasks": {"errors", "files", "core", "models", "data"},
}
BELOW["runs"] = {*BELOW, "saving", "tasks"} - {"integrations"}
BELOW["compression"] = {*BELOW["runs"], "runs"} - {"policies", "dynamic"}
BELOW["paper"] = {*BELOW["runs"], "runs"}
BELOW["report"] = {"errors", "files", "data", "tasks", "runs", "paper"}  # but no torch
BELOW["cli"] = {*BELOW["paper"], "paper", "compression", "report"}
LONGEST_FILE = 360  # lines


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> set[str]:
    """The dotted names of what a file imports, inside functions too, but not for types alone."""
    found: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports are not read here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = {module_name(file): file for file in sorted(SOURCE.rglob("*.py"))}
IMPORTS = {name: imports_of(file) for name, file in FILES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1]


def ours(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    modules = set()
    for imported in IMPORTS[name]:
        module = imported
        while module.startswith(PACKAGE) and module not in FILES:
            module = module.rpartition(".")[0]
        if module in FILES:
            modules.add(module)
    return modules - {name, PACKAGE}


def outside(name: str) -> set[str]:
    """The top-level packages that a module imports, itself and through this package's modules."""
    seen, found, todo = set(), set(), [name]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            found |= {imported.partition(".")[0] for imported in IMPORTS[module]}
            todo += ours(module)
    return found - {PACKAGE}


def modules_of(*rooms: str) -> list[str]:
    return [name for name in FILES if name.count(".") and room_of(name) in rooms]


def test_the_reader_of_imports_reads_them():
    assert f"{PACKAGE}.errors.InputError" in IMPORTS[f"{PACKAGE}.core.tying"]
    assert f"{PACKAGE}.core.tying" in ours(f"{PACKAGE}.policies.dqn")
    assert {"torch", "numpy"} <= outside(f"{PACKAGE}.runs.train")


def test_every_room_is_on_the_plan():
    assert {room_of(name) for name in FILES if name.count(".")} == {*BELOW, "__main__"}


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_from_those_below_it_only(room):
    for name in modules_of(room):
        above = {room_of(each) for each in ours(name)} - {room} - BELOW[room]
        assert not above, f"{name} imports from {above}"


def test_there_is_no_circle():
    graph = {name: ours(name) for name in FILES if name != PACKAGE}
    assert set(TopologicalSorter(graph).static_order()) >= set(graph)


def test_core_is_a_library_of_its_own_on_torch():
    standard = set(sys.stdlib_module_names)
    for name in modules_of("core"):
        assert outside(name) - standard <= {"torch"}, name
    for name in (f"{PACKAGE}.core.tying", f"{PACKAGE}.core.patterns", f"{PACKAGE}.files"):
        assert outside(name) <= standard, name


WITHOUT_TORCH = [
    *(name for name in modules_of("policies") if not name.endswith(".dqn")),
    *modules_of("data", "report", "errors"),
    *(f"{PACKAGE}.{name}" for name in ("runs.config", "runs.reading", "models.config")),
]


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_needs_no_torch(name):
    assert not outside(name) & {"torch", "accelerate", "safetensors"}


def test_no_file_is_too_long():
    lengths = {name: len(file.read_text("utf-8").splitlines()) for name, file in FILES.items()}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE} == {}
