"""``[[wrap]]`` tables -> a method inside its wrappers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fedpeft.algebra.averaging import mean_merge
from fedpeft.errors import BadInput
from fedpeft.experiment.checking import checked, nearest
from fedpeft.types import Method
from fedpeft.wrappers import WRAPPERS, Wrapper


def wrapped(method: Method, tables: Sequence[Mapping[str, Any]]) -> Method:
    """Return ``method`` inside the wrappers that ``tables`` name, the first one outermost.

    Raises BadInput for an unknown wrapper, for fields that it does not have, and for wrappers that
    do not go together.

    >>> from fedpeft.methods.lora import LoRA
    >>> wrapped(LoRA(), [{"name": "fedprox", "mu": 0.1}]).mu
    0.1
    """
    found = wrappers(tables)
    for owner, wrapper in reversed(found.items()):  # from the innermost outwards
        method = wrapper.around(method, owner)
    # Whoever sums up replies that must not be seen one by one says so by having no such merge.
    merge = mean_merge(method, 0)
    if merge is not None and merge.least > 1:
        raise BadInput(
            f"wrap.sharers = {merge.least} of dp: the server would see replies with a part of the "
            "noise one by one; put a table with name = 'secagg' before it, or leave it out"
        )
    return method


def wrappers(tables: Sequence[Mapping[str, Any]]) -> dict[str, Wrapper]:
    """Return the settings of the wrappers that ``tables`` name, in their order.

    They are by the name under which each keeps something on the server: its index and its kind.
    Raises BadInput as ``wrapped`` does.
    """
    found: dict[str, Wrapper] = {}
    for index, table in enumerate(tables):
        fields = dict(table)
        name = fields.pop("name", None)
        if name not in WRAPPERS:
            hint = nearest(str(name), list(WRAPPERS))
            raise BadInput(f"wrap[{index}].name = {name!r} is not a wrapper; {hint}")
        wrapper: Wrapper = checked(WRAPPERS[name], fields, f"wrap[{index}]", also=("name",))
        found[f"{index}.{name}"] = wrapper
    return found


def told(tables: Sequence[Mapping[str, Any]], clients_per_round: int) -> list[dict[str, Any]]:
    """Return ``tables`` with the number of clients of a round where a wrapper needs it.

    >>> told([{"name": "dp"}, {"name": "fedprox"}], clients_per_round=8)
    [{'cohort': 8, 'name': 'dp'}, {'name': 'fedprox'}]
    """
    filled: list[dict[str, Any]] = []
    for table in tables:
        kind = WRAPPERS.get(str(table.get("name")))
        known = dataclasses.fields(kind) if kind else ()  # type: ignore[arg-type]  # a dataclass
        needs_it = any(field.name == "cohort" for field in known)
        default = {"cohort": clients_per_round} if needs_it else {}
        filled.append({**default, **table})
    return filled
