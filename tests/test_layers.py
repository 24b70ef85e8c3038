"""The shape of the code is kept by machine: imports run one way, without cycles; files and functions stay short."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedpeft"

LAYERS: tuple[str, ...] = (
    "errors types seeds",
    "wire codec averaging lowrank sparse importance memory replies optimizer buckets ledger",
    "mounting report",
    "methods tasks data hardware models",
    "activations lanes training evaluation client cohorts federation checkpoint",
    "engines export",
    "choices checking config claim assembly scoring journal folders runs trained parallel compare batch client_data "
    "arguments console interrupts progress api cli",
)
"""From the bottom up; a module imports from its own layer and from those below. The package itself is above all."""

LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()} | {"__init__": len(LAYERS)}

FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def module_of(file: str) -> str:
    """``mounting/__init__.py`` -> ``fedpeft.mounting``."""
    return ".".join(["fedpeft", *file.removesuffix(".py").removesuffix("__init__").rstrip("/").split("/")]).rstrip(".")


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
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_part_has_its_layer() -> None:
    assert {part(module) for module in MODULES} <= set(LAYER)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_to_lower_or_equal_layers(file: str) -> None:
    own = LAYER[part(module_of(file))]
    upward = {name for name in imported(TREES[file]) if name in MODULES and LAYER[part(name)] > own}
    assert not upward


def test_no_two_modules_import_each_other_even_by_way_of_others() -> None:
    graph: Mapping[str, set[str]] = {
        module: {name for name in imported(top_level(TREES[file])) if name in MODULES} - {module}
        for module, file in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_flower_is_known_to_one_file_only() -> None:
    knowing = {file for file, tree in TREES.items() if any(name.split(".")[0] == "flwr" for name in imported(tree))}
    assert knowing <= {"engines/flower.py"}


@pytest.mark.parametrize("file", FILES)
def test_files_are_short(file: str) -> None:
    is_method = file.startswith("methods/")
    assert len(FILES[file].read_text(encoding="utf-8").splitlines()) <= (150 if is_method else 250)


@pytest.mark.parametrize("file", FILES)
def test_functions_are_short(file: str) -> None:
    """At most 40 lines from ``def`` to the last one, the docstring left out."""
    long = {}
    for function in functions(TREES[file]):
        assert function.end_lineno is not None
        lines = function.end_lineno - function.lineno + 1
        if ast.get_docstring(function) is not None:
            first = function.body[0]
            assert first.end_lineno is not None
            lines -= first.end_lineno - first.lineno + 1
        if lines > 40:
            long[function.name] = lines
    assert not long


def test_methods_know_no_other_part_of_the_run() -> None:
    """A method is one file: it may use the algebra and the mounting below it, but neither the loop, tasks nor engines."""
    allowed = {name for name, layer in LAYER.items() if layer <= 2} - {"ledger", "report", "wire"} | {"methods"}
    for file, tree in TREES.items():
        if file.startswith("methods/"):
            used = {part(name) for name in imported(tree) if name in MODULES}
            assert used <= allowed, file
