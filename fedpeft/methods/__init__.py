"""The federated methods, one file each; third parties add theirs through the entry-point group ``fedpeft.methods``."""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from fedpeft.errors import BadInput
from fedpeft.methods.bitfit import BitFit
from fedpeft.methods.fedara import FedARA
from fedpeft.methods.federa import FeDeRA
from fedpeft.methods.ffa_lora import FFALoRA
from fedpeft.methods.full import Full
from fedpeft.methods.local_only import LocalOnly
from fedpeft.methods.lora import LoRA
from fedpeft.methods.slora import SLoRA
from fedpeft.methods.sparse import Sparse
from fedpeft.types import Method

METHODS: Mapping[str, type[Method]] = {
    "full": Full,
    "bitfit": BitFit,
    "lora": LoRA,
    "ffa_lora": FFALoRA,
    "federa": FeDeRA,
    "sparse": Sparse,
    "slora": SLoRA,
    "fedara": FedARA,
    "local_only": LocalOnly,
}

GROUP = "fedpeft.methods"
"""The entry-point group in which third parties name their methods."""


def constructors() -> dict[str, type[Method]]:
    """Return every method by name: ours, then what installed packages add; one that cannot be loaded raises BadInput."""
    return {**{point.name: _loaded(point) for point in entry_points(group=GROUP)}, **METHODS}


def _loaded(point: EntryPoint) -> type[Method]:
    try:
        method: type[Method] = point.load()
    except Exception as error:
        raise BadInput(
            f"method {point.name!r} ({point.value}) cannot be loaded ({type(error).__name__}: {error}); mend or uninstall it"
        ) from error
    if not isinstance(getattr(method, "paper", None), str):
        raise BadInput(
            f"method {point.name!r} ({point.value}) has no class variable 'paper', such as paper: ClassVar[str] = '...'"
        )
    return method
