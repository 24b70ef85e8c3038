"""The wrappers that a site insists on: ``limits.require`` of its ``site.toml``."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fedpeft.errors import BadInput
from fedpeft.experiment.checking import check_finite, checked, nearest
from fedpeft.experiment.wrapping import wrappers
from fedpeft.wrappers import WRAPPERS, Wrapper

Tables = Mapping[str, Mapping[str, Any]]
"""Name of a wrapper -> the fields of it that a site insists on."""

MOST: Final = frozenset(["clip", "delta", "norm"])
"""The fields of which less is stricter. Of any other number more is; texts have to be the same."""


def check_required(require: Tables) -> None:
    """Raise BadInput for a wrapper that there is not, and for fields that it does not have.

    >>> check_required({"secagg": {"smallest": 3}})
    """
    for name in require:
        _required(require, name)
    check_finite(require, "limits.require")


def shortfall(require: Tables, tables: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what a run whose wrappers are ``tables`` lacks of what is required; None for nothing.

    >>> require = {"dpsgd": {"noise": 1.5}}
    >>> shortfall(require, [{"name": "secagg"}])
    'under dpsgd'
    >>> shortfall(require, [{"name": "dpsgd"}])
    'with noise of dpsgd at least 1.5, not 1.0'
    >>> shortfall(require, [{"name": "dpsgd", "noise": 2.0}])
    """
    offered = wrappers(tables)
    for name, fields in require.items():
        least = _required(require, name)
        lacks: list[str | None] = []
        for owner, wrapper in offered.items():
            if owner.partition(".")[2] == name:
                lacks.append(_lack(name, list(fields), least, wrapper))
        if not lacks:
            return f"under {name}"
        # A wrapper may be there twice: one of them has to do.
        if None not in lacks:
            return lacks[0]
    return None


def _required(require: Tables, name: str) -> Wrapper:
    """Return the wrapper with the fields that are required of it; BadInput for a mistake."""
    if name not in WRAPPERS:
        hint = nearest(name, list(WRAPPERS))
        raise BadInput(f"limits.require.{name}: is not a wrapper; {hint}")
    wrapper: Wrapper = checked(WRAPPERS[name], require[name], f"limits.require.{name}")
    return wrapper


def _lack(name: str, fields: Sequence[str], least: Wrapper, offered: Wrapper) -> str | None:
    """Return which of ``fields`` is less strict in ``offered`` than in ``least``."""
    for field in fields:
        wanted, found = getattr(least, field), getattr(offered, field)
        if found == wanted:
            continue
        told = "left out" if found is None else found
        if isinstance(wanted, bool | str):
            return f"with {field} of {name} = {wanted!r}, not {told!r}"
        is_less = field in MOST
        if found is None or (found > wanted if is_less else found < wanted):
            return (
                f"with {field} of {name} at {'most' if is_less else 'least'} {wanted}, not {told}"
            )
    return None
