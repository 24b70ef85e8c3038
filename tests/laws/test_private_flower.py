"""What is used of Flower's insides is all in the table that the self-test reads, and the self-test finds what has changed."""

import ast
from pathlib import Path

import pytest

from fedpeft.engines.flower import private
from fedpeft.errors import BadInput

FOLDER = Path(private.__file__).parent
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation"}
SITE = {"connector.py", "reach.py"}
CLASSES_WITH_MAKERS = {"FleetHttpClient", "ControlHttpClient", "RuntimeHttpClient"}


def inside(file: str) -> set[str]:
    """Return ``module:name`` of all that a file of ours imports from Flower's insides."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((FOLDER / file).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.split(".")[0] == "flwr" and node.module not in PUBLIC:
            found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return found


def known(pieces: private.Pieces) -> set[str]:
    """Return the pieces, a class instead of its maker."""
    return {piece.removesuffix(".from_server_address") for piece in pieces}


# Types of fields, and a module whose default is set where it has one.
UNCHECKED = {"flwr.proto.message_pb2:ObjectTree", "flwr.supercore.inflatable:inflatable_utils"}


def test_all_that_is_used_is_in_the_tables() -> None:
    files = {path.name for path in FOLDER.glob("*.py")}
    site = set().union(*(inside(file) for file in SITE)) - UNCHECKED
    server = set().union(*(inside(file) for file in files - SITE)) - UNCHECKED
    assert site == known(private.SITE)
    assert server == known(private.SERVER)


def test_the_installed_flower_passes() -> None:
    private.check(private.SITE)
    private.check(private.SERVER)


@pytest.mark.parametrize(
    ("piece", "parameters", "told"),
    [
        ("flwr.supernode.gone:Client", (), "is gone"),
        ("flwr.app:Gone", (), "is gone"),
        ("flwr.app:Message", ("content", "colour"), "takes no 'colour' any more"),
    ],
)
def test_what_has_changed_is_named_with_the_way_of_flowers_own_programs(
    piece: str, parameters: tuple[str, ...], told: str
) -> None:
    with pytest.raises(BadInput, match="fedpeft flower-app") as refusal:
        private.check({piece: parameters})
    assert piece in str(refusal.value)
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)
