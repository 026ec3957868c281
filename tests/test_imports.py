"""Arrows run one way: what each module may import, read from its source."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import layer_tying

SOURCE = Path(layer_tying.__file__).parent
PACKAGE = "layer_tying"


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> set[str]:
    """The dotted names of what a file imports, inside functions too."""
    package = module_name(file) if file.name == "__init__.py" else module_name(file.parent / "x.py")
    package = package.removesuffix(".x")
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: 1 - node.level or None], base]).strip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


FILES = {module_name(file): file for file in sorted(SOURCE.rglob("*.py"))}
IMPORTS = {name: imports_of(file) for name, file in FILES.items()}


def ours(name: str) -> set[str]:
    """The modules of this package that a module imports; a bare package name counts as itself."""
    modules = set()
    for imported in IMPORTS[name]:
        module = imported
        while module.startswith(PACKAGE) and module not in FILES:
            module = module.rpartition(".")[0]
        if module in FILES:
            modules.add(module)
    return modules - {name}


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


def full(*names: str) -> set[str]:
    return {f"{PACKAGE}.{name}" for name in names}


def test_the_reader_of_imports_reads_them():
    assert f"{PACKAGE}.errors.InputError" in IMPORTS[f"{PACKAGE}.tying"]
    assert ours(f"{PACKAGE}.dqn") >= full("policies", "tying")
    assert {"torch", "numpy"} <= outside(f"{PACKAGE}.train")
    assert f"{PACKAGE}.train" in ours(f"{PACKAGE}.cli"), "imports inside functions count"


def test_the_algebra_needs_the_standard_library_and_errors_only():
    assert ours(f"{PACKAGE}.tying") == full("errors")
    assert not ours(f"{PACKAGE}.errors")
    assert outside(f"{PACKAGE}.tying") <= set(sys.stdlib_module_names)


def test_there_is_no_circle():
    graph = {name: ours(name) - {PACKAGE} for name in FILES}
    assert set(TopologicalSorter(graph).static_order()) >= set(FILES) - {PACKAGE}


WITHOUT_TORCH = [
    *full("tying", "policies", "config", "errors"),
    *full("data", "tokenizer", "batches", "images", "glue", "files", "pydocs", "lambada"),
    *(name for name in FILES if name.startswith(f"{PACKAGE}.report")),
]


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_needs_no_torch(name):
    assert not outside(name) & {"torch", "transformers", "accelerate", "safetensors"}


KNOWS_NOTHING_OF_POLICIES = full("models", "workload", "evaluate", "surgery", "memory", "find")


@pytest.mark.parametrize("name", sorted(KNOWS_NOTHING_OF_POLICIES))
def test_knows_nothing_of_deciding(name):
    # config names the policies there are; that is all a workload may see of them.
    seen, todo = set(), [name]
    while todo:
        module = todo.pop()
        if module not in seen and module != f"{PACKAGE}.config":
            seen.add(module)
            todo += ours(module)
    assert not seen & full("policies", "dqn", "dynamic", "train", "setup")


def test_only_the_command_knows_the_loop():
    importers = {name for name in FILES if ours(name) & full("train", "cli")}
    assert importers <= full("cli", "__main__")
