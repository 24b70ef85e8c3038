"""How bytes travel between the server and its clients: in this process, or through Flower."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from fedpeft.engines.pool import ClientPool
from fedpeft.errors import BadInput
from fedpeft.types import Engine

T = TypeVar("T")

ENGINES: Mapping[str, str] = {"local": "fedpeft.engines.local", "flower": "fedpeft.engines.flower"}
"""The module of every engine; each has a function ``launch(site, body)``."""


def launch(kind: str, site: ClientPool, body: Callable[[Engine], T]) -> T:
    """Start the clients of ``site``, call ``body`` with the engine that reaches them, and return what it returns."""
    result: T = find(kind).launch(site, body)
    return result


def find(kind: str) -> Any:
    """Return the module of an engine; BadInput where what it needs is not installed."""
    try:
        return import_module(ENGINES[kind])
    except ModuleNotFoundError as error:
        raise BadInput(
            f"engine.kind = {kind!r} needs {error.name!r}; get it with: pip install 'fedpeft[{kind}]'"
        ) from error


__all__ = ["ENGINES", "ClientPool", "find", "launch"]
