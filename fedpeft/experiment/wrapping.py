"""``[[wrap]]`` tables -> a method inside its wrappers."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fedpeft.errors import BadInput
from fedpeft.experiment.checking import checked, nearest
from fedpeft.methods import METHODS
from fedpeft.types import Method
from fedpeft.wrappers import WRAPPERS, NeedsReplies, Wrapper


def wrapped(method: Method, tables: Sequence[Mapping[str, Any]]) -> Method:
    """Return ``method`` inside the wrappers that ``tables`` name, the first one outermost.

    Each gets a name of its own for what it keeps on the server: its index and its kind. Raises
    BadInput for an unknown wrapper, and for fields that it does not have.

    >>> from fedpeft.methods.lora import LoRA
    >>> wrapped(LoRA(), [{"name": "fedprox", "mu": 0.1}]).mu
    0.1
    """
    wrappers = _wrappers(tables)
    for index in reversed(range(len(tables))):  # from the innermost outwards
        name, wrapper = wrappers[index]
        owner = f"{index}.{name}"
        try:
            method = wrapper.around(method, owner)
        except BadInput as error:
            # With other wrappers in between it need not be the method's fault.
            is_innermost = index == len(tables) - 1
            hint = f"; it goes around {_possible(wrapper, owner)}" if is_innermost else ""
            raise BadInput(f"{error}{hint}") from error
    return method


def _possible(wrapper: Wrapper, owner: str) -> str:
    """Return the names of the methods that ``wrapper`` goes around, or ``no method``."""
    possible: list[str] = []
    for name, constructor in METHODS.items():
        with suppress(BadInput):
            wrapper.around(constructor(), owner)
            possible.append(name)
    return ", ".join(possible) or "no method"


def check_replies(tables: Sequence[Mapping[str, Any]], clients_per_round: int) -> None:
    """Raise BadInput where a wrapper needs more replies than the clients of a round can give.

    >>> check_replies([{"name": "krum", "malicious": 1}], clients_per_round=5)
    """
    for index, (name, wrapper) in enumerate(_wrappers(tables)):
        # As with ``mean_merge``: most wrappers need not know of it.
        if isinstance(wrapper, NeedsReplies) and wrapper.least > clients_per_round:
            raise BadInput(
                f"wrap[{index}].name = {name!r} needs {wrapper.least} replies, and "
                f"federation.clients_per_round = {clients_per_round} can never give them; "
                f"choose at least {wrapper.least}"
            )


def _wrappers(tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, Wrapper]]:
    """Return (name, settings) of each of the ``tables``; BadInput for what is none."""
    wrappers: list[tuple[str, Wrapper]] = []
    for index, table in enumerate(tables):
        fields = dict(table)
        name = fields.pop("name", None)
        if name not in WRAPPERS:
            hint = nearest(str(name), list(WRAPPERS))
            raise BadInput(f"wrap[{index}].name = {name!r} is not a wrapper; {hint}")
        where = f"wrap[{index}]"
        wrappers.append((name, checked(WRAPPERS[name], fields, where, also=("name",))))
    return wrappers
