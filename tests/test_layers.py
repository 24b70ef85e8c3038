"""The shape of the code is kept by machine: wings import each other one way, as it is written down here."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedpeft"

WINGS: Mapping[str, str] = {
    "errors": "",
    "types": "",
    "seeds": "",
    "ledger": "",
    "algebra": "seeds",
    "wire": "ledger",
    "data": "seeds report",
    "report": "ledger",
    "mounting": "algebra",
    "secagg": "algebra",
    "privacy": "algebra",
    "wrappers": "algebra mounting privacy secagg wire",
    "methods": "algebra mounting seeds wrappers",
    "method_kit": "algebra mounting seeds",
    "tasks": "data",
    "training": "mounting privacy seeds tasks wire",
    "models": "data mounting seeds tasks training wire",
    "federation": "algebra ledger seeds tasks training wire",
    "engines": "federation ledger wire",
    "experiment": "data engines federation ledger methods models mounting privacy seeds tasks training wire wrappers",
    "deployment": "data engines experiment federation ledger methods models seeds tasks training wire "
    "wrappers",
    "api": "experiment",
    "cli": "data deployment engines experiment methods models report",
}
"""Every wing of the package and the wings that it may import, beside ``errors`` and ``types``."""

FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def module_of(file: str) -> str:
    """``mounting/__init__.py`` -> ``fedpeft.mounting``."""
    return ".".join(
        ["fedpeft", *file.removesuffix(".py").removesuffix("__init__").rstrip("/").split("/")]
    ).rstrip(".")


MODULES = {module_of(file): file for file in FILES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the name of all that ``tree`` imports, anywhere; ``from a import b`` gives ``a.b`` where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where things come from"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def top_level(tree: ast.Module) -> ast.Module:
    """Return what of ``tree`` runs when it is imported, as far as imports go: no function bodies, no TYPE_CHECKING block."""
    kept = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(kept, [])


def part(module: str) -> str:
    """``fedpeft.mounting.layers`` -> ``mounting``."""
    return [*module.split("."), "__init__"][1]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


PICKLES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
"""Modules that turn bytes into any objects, which may be code to run."""
OF_TORCH = {"load", "save"}


def pickles(tree: ast.AST) -> set[str]:
    """Return what of ``tree`` reads or writes pickles: modules that are imported or named, and functions of torch's."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                found |= {alias.name for alias in names if alias.name.split(".")[0] in PICKLES}
                # By another name its functions would not be seen below.
                found |= {"torch as" for alias in names if alias.name == "torch" and alias.asname}
            case ast.ImportFrom(str(module), names):
                found |= {module} if module.split(".")[0] in PICKLES else set()
                taken = {alias.name for alias in names if module.split(".")[0] == "torch"}
                found |= taken & (OF_TORCH | PICKLES)
            case ast.Constant(str(name)) if name in PICKLES:  # import_module("pickle")
                found.add(name)
            case ast.Attribute(ast.Name("torch"), name) if name in OF_TORCH:
                found.add(f"torch.{name}")
            case ast.keyword("allow_pickle"):
                found.add("allow_pickle")
    return found


def test_nothing_of_ours_reads_or_writes_pickles() -> None:
    assert {file: pickles(tree) for file, tree in TREES.items() if pickles(tree)} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import os, pickle as p",
        "from dill import loads",
        "from torch import load",
        "from torch.multiprocessing import pickle",
        "def f():\n    import marshal",
        "importlib.import_module('cloudpickle')",
        "torch.load(path, weights_only=True)",
        "read = torch.load",
        "import torch as t\nt.save(x, path)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_pickles_are_found(line: str) -> None:
    assert pickles(ast.parse(line))


def test_every_wing_says_what_it_imports_and_none_imports_more() -> None:
    imports: dict[str, set[str]] = {wing: set() for wing in WINGS}
    for module, file in MODULES.items():
        if part(module) != "__init__":
            others = {part(name) for name in imported(TREES[file]) if name in MODULES}
            imports[part(module)] |= others - {part(module), "errors", "types"}
    imports["methods"].discard("method_kit")  # a method written outside may move in as it is
    assert imports == {wing: set(allowed.split()) for wing, allowed in WINGS.items()}


def test_no_two_wings_import_each_other_even_by_way_of_others() -> None:
    graph = {wing: set(allowed.split()) for wing, allowed in WINGS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_few_modules_stand_outside_a_wing() -> None:
    loose = {file for file in FILES if "/" not in file}
    assert loose - {"__init__.py", "types.py", "errors.py", "seeds.py"} <= {
        "api.py",
        "method_kit.py",
    }


def test_no_two_modules_import_each_other_even_by_way_of_others() -> None:
    graph: Mapping[str, set[str]] = {
        module: {name for name in imported(top_level(TREES[file])) if name in MODULES} - {module}
        for module, file in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_flower_is_known_to_one_package_only() -> None:
    knowing = {
        file
        for file, tree in TREES.items()
        if any(name.split(".")[0] == "flwr" for name in imported(tree))
    }
    assert knowing
    assert all(file.startswith("engines/flower/") for file in knowing)
