"""``[[wrap]]`` tables -> a method inside its wrappers."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from fedpeft.errors import BadInput
from fedpeft.experiment.checking import checked, nearest
from fedpeft.methods import METHODS
from fedpeft.types import Method
from fedpeft.wrappers import DP, WRAPPERS, NeedsReplies, Wrapper

ON_CLIENTS: Final = frozenset(["fedprox", "dpsgd"])
"""The wrappers around `dp` that change nothing but a client's training."""
AROUND_DP: Final = ON_CLIENTS | {"fedavgm", "fedadam", "fedyogi", "fedadagrad", "secagg"}
"""The wrappers that may stand around `dp`: what they do is done to what it has released."""


def wrapped(method: Method, tables: Sequence[Mapping[str, Any]]) -> Method:
    """Return ``method`` inside the wrappers that ``tables`` name, the first one outermost.

    Raises BadInput for an unknown wrapper, for fields that it does not have, and for wrappers that
    do not go together.

    >>> from fedpeft.methods.lora import LoRA
    >>> wrapped(LoRA(), [{"name": "fedprox", "mu": 0.1}]).mu
    0.1
    """
    found = wrappers(tables)
    _check_around_dp(found)
    for index, (owner, wrapper) in reversed(list(enumerate(found.items()))):  # innermost first
        try:
            method = wrapper.around(method, owner)
        except BadInput as error:
            # With other wrappers in between it need not be the method's fault.
            is_innermost = index == len(tables) - 1
            possible = ", ".join(_possible(wrapper, owner)) if is_innermost else ""
            # Where there is none, the wrapper's own settings are to blame.
            hint = f"; it goes around {possible}" if possible else ""
            raise BadInput(f"{error}{hint}") from error
    return method


def _check_around_dp(found: Mapping[str, Wrapper]) -> None:
    """Raise BadInput where what stands around ``dp`` would break what it promises.

    ``found``: the wrappers by owner, the outermost first.
    """
    kinds = [owner.partition(".")[2] for owner in found]
    for kind in ("dp", "dpsgd"):
        if kinds.count(kind) > 1:
            raise BadInput(f"wrap.name = {kind!r} is there twice; leave one out")
    for place, wrapper in enumerate(found.values()):
        if not isinstance(wrapper, DP):
            continue
        outside = kinds[:place]
        if strange := [kind for kind in outside if kind not in AROUND_DP]:
            raise BadInput(
                f"wrap.name = {strange[0]!r}: around dp it would change, or show, what dp has "
                f"bounded; leave one of the two out. Around dp go: {', '.join(sorted(AROUND_DP))}"
            )
        if wrapper.sharers is not None and "secagg" not in outside:
            raise BadInput(
                f"wrap.sharers = {wrapper.sharers} of dp: the server would see replies with a part "
                "of the noise one by one; put a table with name = 'secagg' before it, or leave it "
                "out"
            )
        # The others do nothing in a round without replies, and so would show that nobody was drawn.
        telling = [kind for kind in outside if kind not in ON_CLIENTS]
        if wrapper.sampling == "poisson" and telling:
            raise BadInput(
                f"wrap.sampling = 'poisson' of dp: with {telling[0]} around it, a round would show "
                "that nobody was drawn; choose 'cohort', or put that table after dp's"
            )


def _possible(wrapper: Wrapper, owner: str) -> list[str]:
    """Return the names of the methods that ``wrapper`` goes around."""
    possible: list[str] = []
    for name, constructor in METHODS.items():
        with suppress(BadInput):
            wrapper.around(constructor(), owner)
            possible.append(name)
    return possible


def check_replies(tables: Sequence[Mapping[str, Any]], clients_per_round: int) -> None:
    """Raise BadInput where a wrapper needs more replies than the clients of a round can give.

    >>> check_replies([{"name": "krum", "malicious": 1}], clients_per_round=5)
    """
    for owner, wrapper in wrappers(tables).items():
        # As with ``mean_merge``: most wrappers need not know of it.
        if isinstance(wrapper, NeedsReplies) and wrapper.least > clients_per_round:
            index, _, name = owner.partition(".")
            raise BadInput(
                f"wrap[{index}].name = {name!r} needs {wrapper.least} replies, and "
                f"federation.clients_per_round = {clients_per_round} can never give them; "
                f"choose at least {wrapper.least}"
            )


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
