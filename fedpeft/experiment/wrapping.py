"""``[[wrap]]`` tables -> a method inside its wrappers."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedpeft.errors import BadInput
from fedpeft.experiment.checking import checked, nearest
from fedpeft.types import Method
from fedpeft.wrappers import WRAPPERS, Wrapper


def wrapped(method: Method, tables: Sequence[Mapping[str, Any]]) -> Method:
    """Return ``method`` inside the wrappers that ``tables`` name, the first one outermost.

    Each gets a name of its own for what it keeps on the server: its place and what it is called.
    BadInput for a wrapper that there is not, or fields that it lacks.

    >>> from fedpeft.methods.lora import LoRA
    >>> wrapped(LoRA(), [{"name": "fedprox", "mu": 0.1}]).mu
    0.1
    """
    for place in reversed(range(len(tables))):
        fields = dict(tables[place])
        name = fields.pop("name", None)
        if name not in WRAPPERS:
            hint = nearest(str(name), list(WRAPPERS))
            raise BadInput(f"wrap[{place}].name = {name!r} is not a wrapper; {hint}")
        wrapper: Wrapper = checked(WRAPPERS[name], fields, f"wrap[{place}]", also=("name",))
        method = wrapper.around(method, f"{place}.{name}")
    return method
