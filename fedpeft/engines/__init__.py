"""How bytes travel between the server and its clients: in this process, or through Flower."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from fedpeft.errors import BadInput

# A site's connector imports this package without torch, which these two load.
if TYPE_CHECKING:
    from fedpeft.engines.pool import ClientPool
    from fedpeft.types import Engine

T = TypeVar("T")

ENGINES: Mapping[str, str] = {
    "local": "fedpeft.engines.local",
    "flower": "fedpeft.engines.flower.simulation",
}
"""The module of every engine; each has a function ``launch(pool, body)``."""


def launch(kind: str, pool: "ClientPool", body: "Callable[[Engine], T]") -> T:
    """Start the clients of ``pool``, call ``body`` with an engine for them, return its result.

    BadInput where a package that the engine needs is not installed.
    """
    result: T = find(kind).launch(pool, body)
    return result


def find(kind: str) -> Any:
    """Return the module of an engine; BadInput where a package that it needs is not installed.

    >>> find("local").__name__
    'fedpeft.engines.local'
    """
    if kind not in ENGINES:
        raise BadInput(f"engine.kind = {kind!r}: start such a run with: fedpeft serve")
    # Imported on demand: Flower and Ray are an optional extra, and take seconds to import.
    try:
        return import_module(ENGINES[kind])
    except ModuleNotFoundError as error:
        raise BadInput(
            f"engine.kind = {kind!r} needs {error.name!r}; "
            f"get it with: pip install 'fedpeft[{kind}]'"
        ) from error


__all__ = ["ENGINES", "find", "launch"]
